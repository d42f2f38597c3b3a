"""Give every test its own cache folder, and hide the settings of this machine."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from cifar_dist.config import parse_recipe
from cifar_dist.train import run
from cifar_dist.training.run import Result
from tests.helpers import JOB, TINY, Integers, tested
from tests.server import Server, running

# Two tests run at a time, and their networks are too small to gain from a second thread. Set before
# torch starts its threads: results are rounded differently with another number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

# Without a GPU our kernels run in Triton's interpreter. Triton reads the variable when imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell lets its background jobs ignore SIGINT. Launchers started by the tests would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def clean_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Keep caches and Accelerate's settings of this machine out of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with running() as start:
        yield start


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished run with an accuracy above chance, a validation split and TensorBoard files."""
    out = tmp_path_factory.mktemp("trained") / "run"
    recipe, _ = parse_recipe(
        [
            *TINY,
            "--out",
            str(out),
            "--data.limit_train",
            "1600",
            "--data.val_fraction",
            "0.1",
            "--optim.name",
            "adamw",
            "--optim.lr",
            "0.0015",
            "--train.seed",
            "2",
            "--model.name",
            "tutorial-relu",
            "--model.dropout",
            "0",
            "--train.epochs",
            "4",
            "--track.log_with",
            "[tensorboard]",
            "--track.every_steps",
            "20",
        ]
    )
    return run(recipe)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Integers]:
    """Return a function that trains JOB with more options on one process, for its test integers."""

    @cache
    def train(*options: str) -> Integers:
        out = tmp_path_factory.mktemp("alone") / "run"
        recipe, _ = parse_recipe([*JOB, *options, "--out", str(out)])
        run(recipe)
        return tested(out)

    return train
