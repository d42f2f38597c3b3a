"""Weights from other programs: converted without running code, then used to start training."""

import errno
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cifar_dist import convert, train
from cifar_dist.config import parse_recipe
from cifar_dist.errors import UsageError
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.models.tutorial import tutorial
from cifar_dist.storage.checkpoint import find_checkpoint
from cifar_dist.storage.weights import load_weights
from cifar_dist.train import run
from cifar_dist.training.run import Result
from tests.helpers import TINY, Bomb, write_folder

Tensors = dict[str, torch.Tensor]
HEAD = {"9.weight", "9.bias"}  # of the tutorial network
ONE = torch.ones(1)
CRAFTED = {"0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}


@pytest.fixture
def weights() -> Tensors:
    """Weights of the tutorial network, from a seed that no run uses."""
    torch.manual_seed(1234)
    return dict(tutorial(10).state_dict())


def start(out: Path, place: Path, *options: str, epochs: int = 1) -> Result:
    """Train from the weights at `place`, with a learning rate too small to change them."""
    common = ["--train.epochs", str(epochs), "--optim.lr", "1e-12", "--out", str(out)]
    return run(parse_recipe([*TINY, *common, "--model.weights", str(place), *options])[0])


def saved(result: Result) -> Tensors:
    return find_checkpoint(str(result.out))[1].model


def equal(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=0, atol=1e-8) for name in left
    )


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict"])
def test_converted_weights_equal_the_saved_ones(
    prefix: str, key: str | None, weights: Tensors, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    content: Any = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    torch.save(content if key is None else {"epoch": 3, key: content}, tmp_path / "in.pt")
    files = [str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]
    assert convert.main([*files, *(["--key", key] if key else [])]) == 0
    count = sum(tensor.numel() for tensor in weights.values())
    assert capfd.readouterr().out == f"{files[1]}: 10 tensors, {count} parameters and buffers\n"
    found = load_file(files[1])
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.safetensors"]


def test_a_prefix_that_some_names_lack_is_kept(tmp_path: Path) -> None:
    torch.save({"module.a": ONE, "b": ONE}, tmp_path / "in.pt")
    convert.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {"module.a", "b"}


def test_a_full_disk_leaves_no_partial_file(
    weights: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, tmp_path / "in.pt")

    def sync(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cifar_dist.files.sync", sync)
    with pytest.raises(UsageError, match=r"cannot be written .*No space left on device"):
        convert.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_tensors_that_share_memory_or_are_not_contiguous_are_copied(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a": shared, "b": shared, "c": shared.T, "d": shared[1]}, tmp_path / "in.pt")
    convert.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["b"], shared)
    assert torch.equal(found["c"], shared.T)
    assert torch.equal(found["d"], shared[1])


@pytest.mark.fault(34)
@pytest.mark.parametrize("kind", ["new", "old", "plain", "beside the weights"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(
    kind: str,
    weights: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    source, target, mark = (tmp_path / name for name in ("in.pt", "out.safetensors", "mark"))
    if kind == "plain":
        source.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        content = {"state_dict": weights, "note": Bomb(mark)} if " " in kind else Bomb(mark)
        torch.save(content, source, _use_new_zipfile_serialization=kind != "old")
    assert convert.main([str(source), str(target), "--key", "state_dict"]) == 2
    error = capfd.readouterr().err
    assert "contains objects other than tensors" in error
    assert "refused, because unpickling them could run code" in error
    assert error.count("\n") == 1
    assert train.main([*TINY, "--model.weights", str(source), "--out", str(tmp_path / "run")]) == 2
    assert f"cifar-dist convert {source}" in capfd.readouterr().err
    assert not mark.exists()
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"epoch": 3, "model": {"w": torch.ones(2)}}, [], "the entries epoch (int), model (dict)"),
        ({"epoch": 3, "model": {"w": torch.ones(2)}}, [], "give --key with one of: model"),
        ({"model": {"w": torch.ones(2)}}, ["--key", "ema"], "no state_dict under --key ema"),
        (
            {"epoch": 3, "model": {"w": 1}},
            ["--key", "model"],
            "save only the network's state_dict()",
        ),
        ({"w": torch.ones(2)}, ["--key", "model"], "is itself a state_dict; remove --key"),
        ({"a\n\x1b[31m": 3}, [], "a\\n\\x1b[31m (int)"),
        (torch.ones(2), [], "but a Tensor"),
        ({}, [], "but a dict"),
        ({"w": torch.eye(2).to_sparse()}, [], "does not store every value of w"),
        ({"w": torch.ones(1).expand(2**40)}, [], "does not store every value of w"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, [], "tensors of type torch.complex128"),
    ],
)
def test_files_without_weights_are_refused(
    content: Any,
    options: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    torch.save(content, tmp_path / "in.pt")
    files = [str(tmp_path / "in.pt"), str(tmp_path / "out.safetensors")]
    assert convert.main([*files, *options]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["in.pt"]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.pt", "out.safetensors", "is not a file"),
        ("text.pt", "out.safetensors", "contains objects other than tensors"),
        ("empty.pt", "out.safetensors", "cannot be read as a file of torch.save"),
        ("cut.pt", "out.safetensors", "cannot be read as a file of torch.save"),
        ("in.pt", "in.pt", "does not end in .safetensors"),
        ("in.pt", "old.safetensors", "exists"),
        ("in.pt", "link.safetensors", "exists"),
        ("in.pt", "absent/out.safetensors", "cannot be written"),
    ],
)
def test_unreadable_sources_and_invalid_targets_are_refused(
    source: str,
    target: str,
    message: str,
    weights: Tensors,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    torch.save(weights, tmp_path / "in.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "in.pt").read_bytes()[:1000])
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    assert convert.main([str(tmp_path / source), str(tmp_path / target)]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "link.safetensors").is_symlink()


def test_training_starts_from_converted_weights_and_resumes_without_them(
    weights: Tensors, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "in.pt")
    place = tmp_path / "out.safetensors"
    convert.convert(tmp_path / "in.pt", place)
    assert equal(saved(start(tmp_path / "run", place)), weights)
    place.unlink()
    assert equal(saved(start(tmp_path / "run", place, epochs=2)), weights)


def test_training_starts_from_the_averaged_weights_of_a_run(tmp_path: Path) -> None:
    first = run(parse_recipe([*TINY, "--train.ema", "0.9", "--out", str(tmp_path / "first")])[0])
    path, checkpoint = find_checkpoint(str(first.out))
    assert not equal(checkpoint.ema, checkpoint.model)
    for number, place in enumerate((first.out, path)):
        second = start(tmp_path / f"second-{number}", place, "--train.ema", "0.5")
        found = find_checkpoint(str(second.out))[1]
        assert equal(found.model, checkpoint.ema)
        assert equal(found.ema, checkpoint.ema)


def test_another_number_of_classes_gets_a_new_head(weights: Tensors, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    root = write_folder(tmp_path / "set", {"train": 30, "test": 9})
    options = ["--data.name", "imagefolder", "--data.root", str(root), "--train.batch_size", "10"]
    found = saved(start(tmp_path / "run", tmp_path / "w.safetensors", *options))
    assert found["9.weight"].shape == (3, 64)
    assert equal(*({k: v for k, v in t.items() if k not in HEAD} for t in (found, weights)))


@pytest.mark.parametrize("there", [HEAD, {"9.weight"}, set()])
def test_a_head_is_loaded_completely_or_not_at_all(
    there: set[str], weights: Tensors, tmp_path: Path
) -> None:
    given = {name: tensor for name, tensor in weights.items() if name not in HEAD - there}
    save_file({name: tensor.double() for name, tensor in given.items()}, tmp_path / "w.safetensors")
    network = tutorial(10)
    head = {name: network.state_dict()[name].clone() for name in HEAD}
    assert load_weights(network, str(tmp_path / "w.safetensors")) is (there != HEAD)
    assert equal(dict(network.state_dict()), weights if there == HEAD else {**weights, **head})


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_loaded(
    kind: torch.dtype, weights: Tensors, tmp_path: Path
) -> None:
    given = {name: tensor.to(kind) for name, tensor in weights.items()}
    save_file(given, tmp_path / "w.safetensors")
    network = tutorial(10)
    assert not load_weights(network, str(tmp_path / "w.safetensors"))
    assert equal(dict(network.state_dict()), {name: t.float() for name, t in given.items()})


def test_a_head_without_a_bias_is_loaded(tmp_path: Path) -> None:
    given = dict(SpeedNet(10, widths=(8,)).state_dict())
    save_file(given, tmp_path / "w.safetensors")
    network = SpeedNet(10, widths=(8,))
    assert not load_weights(network, str(tmp_path / "w.safetensors"))
    assert equal(dict(network.state_dict()), given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": None, "0.bias": None}, "it lacks 0.weight, 0.bias; choose the model.name"),
        (dict.fromkeys("abcde", ONE), "it has unknown a, b, c and 2 more; choose"),
        ({"x\n\x1b[2J": ONE}, "it has unknown x\\n\\x1b[2J; choose"),
        ({"0.bias": ONE}, "it differs in 0.bias (float32 [1] there, float32 [32] here)"),
        ({"0.bias": torch.ones(32, dtype=torch.int8)}, "0.bias (int8 [32] there, float32"),
        ({"9.bias": torch.ones(10, dtype=torch.int8)}, "9.bias (int8 [10] there, float32"),
        ({"0.bias": None, "9.bias": ONE, "y": ONE}, "it lacks 0.bias; it has unknown y; choose"),
    ],
)
def test_weights_that_do_not_fit_do_not_change_the_network(
    change: dict[str, torch.Tensor | None], message: str, weights: Tensors, tmp_path: Path
) -> None:
    given = {name: value for name, value in {**weights, **change}.items() if value is not None}
    save_file({name: value.clone() for name, value in given.items()}, tmp_path / "w.safetensors")
    network: nn.Module = tutorial(10)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UsageError) as refused:
        load_weights(network, str(tmp_path / "w.safetensors"))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert equal(dict(network.state_dict()), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.safetensors", "does not exist"),
        ("in.pt", "in.pt OUT.safetensors"),
        ("crafted.safetensors", "is not a whole safetensors file"),
        ("cut.safetensors", "is not a whole safetensors file"),
        ("folder", "neither a run folder nor a checkpoint"),
        ("deep.safetensors", "it lacks 0.weight"),
    ],
)
@pytest.mark.fault(34, 35)
def test_training_refuses_invalid_weights_before_its_first_step(
    name: str, message: str, weights: Tensors, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "in.pt")
    save_file(weights, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
    header = json.dumps(CRAFTED).encode()
    (tmp_path / "crafted.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "deep.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=message) as refused:
        start(tmp_path / "run", tmp_path / name)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


class Learners(nn.Module):
    """The tutorials' network, with their names and layer numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, 1, 2), nn.MaxPool2d(2), nn.Conv2d(32, 32, 5, 1, 2)),
            *(nn.MaxPool2d(2), nn.Conv2d(32, 64, 5, 1, 2), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(64 * 4 * 4, 64), nn.Linear(64, 10)),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


@pytest.mark.parametrize("prefix", ["", "module.", "net.inner."])
def test_weights_of_the_tutorials_get_the_names_of_the_shipped_network(
    prefix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = Learners().eval()
    state = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(state, tmp_path / "model_9.pth")
    target = tmp_path / "weights.safetensors"
    assert convert.main([str(tmp_path / "model_9.pth"), str(target), "--to", "tutorial"]) == 0
    assert "model.7.weight -> 8.weight [64, 1024]" in capfd.readouterr().out
    shipped = tutorial(10)
    load_weights(shipped, str(target))
    images = torch.rand(8, 3, 32, 32)
    torch.testing.assert_close(shipped.eval()(images), network(images))


def test_weights_of_another_network_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(Learners().state_dict(), tmp_path / "model_9.pth")
    names = [str(tmp_path / "model_9.pth"), str(tmp_path / "weights.safetensors")]
    for to, message in {
        "tutorial-wide": "has 10 tensors, and tutorial-wide has 12; name the network that",
        "tutorail": "unknown network 'tutorail'; did you mean 'tutorial'?",
    }.items():
        assert convert.main([*names, "--to", to]) == 2
        assert message in capfd.readouterr().err
    torch.save({f"a.{n}": torch.ones(n + 1) for n in range(10)}, tmp_path / "model_9.pth")
    assert convert.main([*names, "--to", "tutorial"]) == 2
    assert "a.0 has the shape [1], but 0.weight of tutorial" in capfd.readouterr().err
    assert not (tmp_path / "weights.safetensors").exists()
