"""One job for every way to launch it: however it was started, its test integers are the same."""

from collections.abc import Callable
from functools import cache

import pytest

from cifar_dist.config import parse_recipe
from cifar_dist.train import run
from tests.helpers import JOB, Integers, tested


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Integers]:
    """Return what gives the test integers of JOB, with more options, on a single process."""

    @cache
    def train(*options: str) -> Integers:
        out = tmp_path_factory.mktemp("alone") / "run"
        recipe, _ = parse_recipe([*JOB, *options, "--out", str(out)])
        run(recipe)
        return tested(out)

    return train
