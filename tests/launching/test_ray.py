"""launch/ray_train.py on two CPU workers of a local Ray cluster."""

import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cifar_dist.errors import PeersMissing
from cifar_dist.processes.ending import Ending
from tests.helpers import JOB, Integers, needs, read_lines, tested
from tests.launching.nodes import run_on_nodes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return variables that keep Ray out of the home folder and disable its telemetry."""
    needs("ray")
    with tempfile.TemporaryDirectory(prefix="ray") as short:  # Ray puts Unix sockets there
        yield {
            "HOME": str(tmp_path),
            "RAY_TMPDIR": short,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'launch'}",
        }


@pytest.mark.slow
def test_two_workers_train_as_one_process_does(
    environment: dict[str, str], tmp_path: Path, alone: Callable[..., Integers]
) -> None:
    command = ["python", str(ROOT / "launch" / "ray_train.py"), "--workers", "2", *JOB]
    printed = run_on_nodes([*command, "--out", str(tmp_path / "run")], [environment])
    assert "2 processes" in printed
    assert tested(tmp_path / "run") == alone()


@pytest.mark.slow
def test_a_killed_worker_does_not_change_the_result(
    environment: dict[str, str], tmp_path: Path, alone: Callable[..., Integers]
) -> None:
    command = ["python", "-m", "tests.launching.ray_killed", "--workers", "2", *JOB]
    command += ["--checkpoint.every_steps", "4", "--out", str(tmp_path / "run")]
    printed = run_on_nodes(command, [environment])
    assert (tmp_path / "killed").exists()
    assert "continues at step 4" in printed
    assert tested(tmp_path / "run") == alone()
    steps = [line["step"] for line in read_lines(tmp_path / "run") if "window" in line["split"]]
    assert steps == list(range(1, 21))


@pytest.mark.parametrize("error", [Ending(1, "why").to_error(), PeersMissing("who")])
def test_the_errors_of_a_run_can_be_pickled(error: Exception) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived)) == (type(error), str(error))
    assert vars(arrived) == vars(error)
