"""The same job started by every launcher of one machine gives the same test integers."""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import JOB, Integers, by_mpi, command, free_port, needs, run_command, tested

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))


def c10d() -> list[str]:
    meet = ["--nnodes", "1", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_id", "job"]
    return [TORCHRUN, *meet, f"--rdzv_endpoint=localhost:{free_port()}", "-m", "cifar_dist.train"]


def accelerate_by_mpirun() -> list[str]:
    """Return the command with which `accelerate launch` calls mpirun."""
    needs("mpirun")
    hosts = Path(tempfile.mkdtemp()) / "hostfile"
    hosts.write_text("localhost slots=2\n")
    launch = [str(Path(TORCHRUN).with_name("accelerate")), "launch", "--cpu"]
    counts = ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
    as_root = ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]
    variables = [f"MASTER_PORT={free_port()}", *as_root]
    named = ["--mpirun_hostfile", str(hosts)]
    return ["env", *variables, *launch, *counts, *named, "-m", "cifar_dist.train"]


PLACES: dict[str, tuple[int, Callable[[], list[str]]]] = {
    "python": (1, command),
    "accelerate launch": (1, lambda: command(1, "accelerate")),
    "accelerate launch on two": (2, lambda: command(2, "accelerate")),
    "torchrun": (2, lambda: command(2)),
    "torchrun by c10d": (2, c10d),
    "mpirun": (2, lambda: by_mpi(command())),
    "accelerate launch by mpirun": (2, accelerate_by_mpirun),
}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "start"), PLACES.values(), ids=PLACES)
def test_the_launcher_does_not_change_the_result(
    processes: int, start: Callable[[], list[str]], alone: Callable[..., Integers], tmp_path: Path
) -> None:
    done = run_command([*start(), *JOB, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == processes
    assert tested(tmp_path / "run") == alone()
