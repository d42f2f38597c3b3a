"""Steps replayed as a CUDA graph, compared with eager steps, on a GPU."""

from pathlib import Path

import pytest
import torch

from cifar_dist.config import parse_recipe
from cifar_dist.train import run
from cifar_dist.training import engine
from tests.helpers import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

SPEEDNET = ["--model.name", "speednet", "--model.widths", "[16, 32]", "--augment.translate", "2"]
CASES = {
    "sgd": ["--optim.momentum", "0.9", "--train.clip_norm", "1"],
    "adamw": ["--optim.name", "adamw", "--optim.lr", "0.001", "--train.ema", "0.9"],
    "dropout": ["--model.name", "tutorial-wide", "--model.dropout", "0.5"],
    "muon": [*SPEEDNET, "--optim.name", "muon", "--optim.bias_lr", "1"],
}


def weights_of(out: Path, *options: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    arguments = [*TINY, "--train.deterministic", "true", *options, "--out", str(out)]
    run(parse_recipe(arguments)[0])
    newest = sorted((out / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_a_replayed_step_equals_an_eager_step(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed = weights_of(tmp_path / "replayed", *CASES[case], "--train.epochs", "3")
    monkeypatch.setattr(engine, "can_record", lambda *_: False)
    taken = weights_of(tmp_path / "taken", *CASES[case], "--train.epochs", "3")
    for name, values in taken.items():
        torch.testing.assert_close(replayed[name], values, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_replays_the_same_steps(case: str, tmp_path: Path) -> None:
    whole = weights_of(tmp_path / "whole", *CASES[case], "--train.epochs", "3")
    weights_of(tmp_path / "parts", *CASES[case], "--train.epochs", "1")
    parts = weights_of(tmp_path / "parts", *CASES[case], "--train.epochs", "3")
    assert all(torch.equal(parts[name], values) for name, values in whole.items())
