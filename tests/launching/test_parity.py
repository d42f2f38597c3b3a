"""Parity: N processes equal one process, and a missing all-reduce is reported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import StochasticDepth

from cifar_dist.config import parse_recipe, recipe_names
from cifar_dist.launching import parity
from tests.helpers import TINY

DRAWN = ["--data.name", "synthetic"]
DROPPING = ("residual", "smoke", "tutorial-augmented", "vgg16")
BATCH = 24  # small enough for a few seconds on a CPU


def test_two_processes_equal_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "CONTROLS", 2)  # instead of three, to save time
    assert parity.main([*TINY, "--train.batch_size", "33"]) == 0
    told = capsys.readouterr().out
    assert "changed, 2 runs: loss within" in told
    assert "2 processes against 1: loss within" in told
    assert "note: batches have 34 images here, which divide among 2 processes" in told
    assert "batchnorm" not in told


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_on_one_two_and_three_processes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = parse_recipe(["--config", name])
    rate = recipe.optim.lr * BATCH / recipe.train.batch_size  # chaotic at the full rate
    small = ["--train.batch_size", str(BATCH), "--steps", "2"]
    small += ["--optim.lr", str(rate)] * (recipe.optim.name != "muon")
    code = parity.main(["--config", name, *DRAWN, *small, "--processes", "1,2,3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0, found
    exact = [key for key in found if key.startswith(("2 processes", "3 processes"))]
    normalised = any(entry["code"] == "batchnorm" for entry in found["findings"])
    off = any("dropout is off here" in entry["message"] for entry in found["findings"])
    assert off == (name in DROPPING)
    assert len(exact) == (4 if normalised else 2)
    assert normalised == any("micro-batches" in key for key in exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gradients", "2 processes: the weights of rank 1 are no longer those of rank 0"),
        ("mean", "2 processes against 1: the gradient norm differs first at step 1, by 1.0e+00"),
        ("loss", "2 processes against 1: the loss differs first at step 1, by"),
    ],
)
def test_a_missing_all_reduce_is_found(
    what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ["-m", "tests.worker", "train_without", what]
    assert parity.compare([*TINY, "--steps", "2"], program) == 2
    assert f"error: {message}" in capsys.readouterr().out


def test_a_difference_beyond_rounding_is_reported_with_its_first_step() -> None:
    shares = [{"a": 1e-5, "b": 1e-4}, {"a": 1e-5, "b": 1e-3}]
    rounding = parity.Difference([1e-9, 1e-7], [1e-9, 1e-5], shares, [1e-4, 1e-3])
    shares = [{"a": 1e-4, "b": 1e-3}, {"a": 1e-4, "b": 1e-1}]
    found = parity.Difference([1e-6, 1e-4], [1e-6, 1e-3], shares, [1e-3, 1e-1])
    assert found.beyond(rounding) == [
        "the loss differs first at step 2, by 1.0e-04",
        "the gradient norm differs first at step 2, by 1.0e-03",
        "1 of 2 weights differ first after step 2, most of all b: by 1.0e-01 of its change",
    ]
    assert rounding.beyond(rounding) == []


@pytest.mark.parametrize(
    ("layer", "draws"),
    [
        (nn.Dropout(0.1), True),
        (nn.Dropout(0.0), False),
        (StochasticDepth(0.5, "row"), True),
        (StochasticDepth(0.0, "row"), False),
        (nn.RReLU(), True),
        (nn.BatchNorm2d(3), False),
    ],
    ids=repr,
)
def test_layers_that_draw_random_numbers_are_found(layer: nn.Module, draws: bool) -> None:
    network = nn.Sequential(layer, nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert parity.draws_random_numbers(network, 8) == draws
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_random_layers_that_stay_on_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = parity.Run([], [], [], {"classes": list(range(10))})
    monkeypatch.setattr(parity.Comparison, "_train", lambda *_: alone)
    network = nn.Sequential(nn.RReLU(), nn.Flatten(), nn.Linear(3072, 10))
    monkeypatch.setattr(parity, "_build", lambda *_: network)
    assert parity.main(TINY) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: tutorial draws random numbers in training even with model.drop")


def test_a_control_starts_with_weights_that_differ_in_the_last_bit(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.BatchNorm1d(10))
    network[1].weight.requires_grad_(False)
    parity._write_rounded(network, tmp_path / "w.safetensors")
    rounded = load_file(tmp_path / "w.safetensors")
    for name, tensor in network.state_dict().items():
        if name == "1.weight" or "running" in name or "batches" in name:
            assert torch.equal(rounded[name], tensor)
        else:
            up, down = (torch.nextafter(tensor, torch.tensor(end)) for end in (9e9, -9e9))
            assert ((rounded[name] == up) | (rounded[name] == down)).all()
            assert (rounded[name] == up).any()
            assert (rounded[name] == down).any()


def test_rounding_in_later_steps_does_not_excuse_earlier_differences() -> None:
    same = [{"a": 1e-7}] * 2
    rounding = parity.Difference([1e-9, 1e-3], [1e-9, 1e-3], same, [1e-7] * 2)
    found = parity.Difference([1e-4, 1e-4], [1e-4, 1e-4], same, [1e-7] * 2)
    assert found.beyond(rounding) == [
        "the loss differs first at step 1, by 1.0e-04",
        "the gradient norm differs first at step 1, by 1.0e-04",
    ]


def test_differences_are_compared_with_the_largest_of_all_controls() -> None:
    one = parity.Difference([1e-7, 1e-6], [2e-7, 1e-5], [{"a": 1e-5, "b": 1e-3}], [1e-4])
    other = parity.Difference([2e-7, 1e-8], [1e-7, 1e-4], [{"a": 1e-4, "b": 1e-5}], [1e-3])
    assert parity.largest([one, other]) == parity.Difference(
        [2e-7, 1e-6], [2e-7, 1e-4], [{"a": 1e-4, "b": 1e-3}], [1e-3]
    )


@pytest.mark.parametrize(
    ("whole", "level"),
    [([1e-3, 2e-2], None), ([1e-3, 0.2, 0.3], "note"), ([0.2, 0.3], "warning")],
)
def test_chaos_is_a_warning_if_it_begins_in_the_first_step(
    whole: list[float], level: str | None
) -> None:
    same = [0.0] * len(whole)
    found = parity.Difference(same, same, [{"a": share} for share in whole], whole).blur()
    assert [finding.level for finding in found] == ([level] if level else [])
    assert all("rounding alone makes 2.0e-01 of the change" in finding.message for finding in found)


def test_an_error_of_the_single_process_is_not_reported_as_a_difference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parity.main([*TINY, "--data.name", "imagefolder", "--data.root", "/nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: data.root '/nowhere' is not a folder")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", "1,x"], "--processes is '1,x'; give numbers such as 1,2,4"),
        (["--processes", "1"], "--processes names no number above 1"),
        (["--steps", "0"], "--steps is 0; give 1 or more"),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parity.main([*TINY, *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
