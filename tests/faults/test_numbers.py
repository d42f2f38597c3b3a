"""NaN and infinite values: no process changes its weights, and the samples are named."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from cifar_dist.storage.checkpoint import load_newest
from cifar_dist.training.guard import describe_bad_step
from tests.forked import start
from tests.helpers import TINY

OPTIONS = [*TINY, "--checkpoint.every_steps", "2", "--train.epochs", "1", "--checkpoint.keep", "9"]


def first_step_with(position: int, batch: int = 32) -> int:
    """Return the first step, from 1, that trains on an image of the TINY set."""
    from cifar_dist.data.batches import permutation

    return permutation(320, 0, 0).tolist().index(position) // batch + 1


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("nan", "loss nan"),
        ("loss", "loss inf"),
        ("gradient", "gradient"),
        ("nan and ignores_found_inf", "loss nan"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_image_on_one_process_reaches_no_weights(
    kind: str, shown: str, processes: int, tmp_path: Path
) -> None:
    position = next(p for p in range(320) if first_step_with(p) == 6)
    out = tmp_path / "run"
    # With accumulation the image is in one of several micro-batches, and reports are rare.
    options = [*OPTIONS, "--out", str(out), "--train.accumulate", "2", "--track.every_steps", "7"]
    with start(options, processes, folder=tmp_path, fault=f"bad_image {position} {kind}") as job:
        assert job.wait() == [1] * processes
        assert job.text().count("error: ") == 1
        line = job.text(0).splitlines()[-1]
    assert "a loss or gradient is not finite at step 6 on rank " in line
    assert f"training images {position} ({shown});" in line
    assert "the weights are still those of step 5" in line
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], f"error: {status['message']}") == ("failed", line)

    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert newest[1].progress.step == 4
    for tensors in newest[1].files().values():
        assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("count", "shown"),
    [(1, "0"), (8, "0, 1, 2, 3, 4, 5, 6, 7"), (10, "0, 1, 2, 3, 4, 5, 6, 7 and 2 more")],
)
def test_a_message_names_the_first_few_samples(count: int, shown: str) -> None:
    line = str(describe_bad_step(Accelerator(cpu=True), list(map(str, range(count))), 3))
    assert f"is not finite at step 3 on rank 0, training images {shown}; the weights" in line


@pytest.mark.fault(24)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimizer_changes_nothing_from_the_bad_step_on(name: str) -> None:
    from cifar_dist.config import OptimConfig
    from cifar_dist.training.guard import Guard
    from cifar_dist.training.optim import build_optimizer

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))  # type: ignore[arg-type]
    guard = Guard(optimizer, torch.device("cpu"))
    history = []
    for norm in (1.0, 1e30, float("inf"), 1.0, float("nan")):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        guard.admits(torch.tensor(norm))
        optimizer.step()
        history.append(model.weight.detach().clone())
    assert not torch.equal(history[0], history[1])
    assert all(torch.equal(weights, history[1]) for weights in history[2:])
    assert guard.skipped() == 3
