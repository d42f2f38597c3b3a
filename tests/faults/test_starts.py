"""The printed line names the cause of a failed start, whichever process exits first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from cifar_dist.processes.preemption import EXIT_CODE
from tests.forked import Job, start
from tests.helpers import TINY, command, run_command, status_of, write_folder

STOPPED = "stopped by a signal before training began; nothing was lost\n"
KILLED = "error: rank 1 exited without an error message (probably killed by the OOM killer)"


@pytest.fixture
def folders(tmp_path: Path) -> list[list[str]]:
    """Return the options of two ranks; the images of the second are missing."""
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    options = [*TINY, "--data.name", "imagefolder", "--data.cache", str(tmp_path / "cache")]
    options += ["--train.batch_size", "4", "--out", str(tmp_path / "run")]
    return [[*options, "--data.root", str(place)] for place in (root, tmp_path / "absent")]


@contextmanager
def launch(options: list[list[str]], tmp_path: Path, fault: str) -> Iterator[Job]:
    """Start two processes with a store of the launcher; yield once they load the dataset."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    mark = tmp_path / "mark"
    variables["FAULT_MARK"] = str(mark)
    with start(options, 2, folder=tmp_path, fault=fault, **variables) as job:
        job.wait_until(mark.exists)
        yield job


@pytest.mark.fault(74)
def test_the_process_that_refuses_reports_before_the_launcher_ends_the_others(
    folders: list[list[str]], tmp_path: Path
) -> None:
    with launch(folders, tmp_path, "slow_start 60 0 and slow_start 1 1") as job:
        job.processes[1].join(20)
        assert job.processes[1].exitcode == 2
        job.signal(signal.SIGTERM, 0)  # as a launcher does
        assert job.wait(20) == [2, 2]
        assert job.text(0) == ""
        assert job.text(1).startswith("error: data.root '")
        assert job.text(1).count("\n") == 1
    assert not (tmp_path / "run/status.json").exists()


def test_the_first_process_reports_for_its_machine(
    folders: list[list[str]], tmp_path: Path
) -> None:
    with start(folders, 2, folder=tmp_path) as job:
        assert job.wait(20) == [2, 2]
        assert job.text(0).startswith("error: data.root '")
        assert job.text().count("\n") == 1


def test_no_process_exits_before_the_cause_is_printed(
    folders: list[list[str]], tmp_path: Path
) -> None:
    with start(folders, 2, folder=tmp_path, fault="slow_report 1") as job:
        job.processes[1].join(20)
        assert job.text(0).startswith("error: data.root '")
        assert job.wait(20) == [2, 2]


@pytest.mark.fault(75)
def test_a_process_that_is_killed_at_the_start_is_named(
    folders: list[list[str]], tmp_path: Path
) -> None:
    with launch([folders[0]] * 2, tmp_path, "slow_start 60 0 and killed_at_start 1") as job:
        job.processes[1].join(20)
        job.signal(signal.SIGTERM, 0)
        assert job.wait(20) == [1, -signal.SIGKILL]
        assert job.text() == f"{KILLED} at the start\n"


@pytest.mark.fault(76)
@pytest.mark.parametrize("rank", [None, pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_at_the_start_is_the_cause_if_no_process_has_failed(
    rank: int | None, folders: list[list[str]], tmp_path: Path
) -> None:
    slow = 60 if rank is None else 4
    (tmp_path / "run").mkdir()  # rank 0 holds its lock
    with launch([folders[0]] * 2, tmp_path, f"slow_start {slow}") as job:
        job.signal(signal.SIGTERM, rank)
        assert job.wait(20) == [EXIT_CODE, EXIT_CODE], job.text()
        assert job.text() == STOPPED
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"]) == ("preempted", 0)


LAUNCHES = [("accelerate", 2), ("torchrun", 2), ("torchrun", 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "processes"), LAUNCHES)
@pytest.mark.parametrize("cause", ["no data", "batch", "class", "unreadable"])
def test_the_cause_is_printed_under_every_launcher(
    cause: str, launcher: str, processes: int, tmp_path: Path
) -> None:
    options = [*TINY, "--data.root", str(tmp_path), "--train.batch_size", "24"]
    own = command(processes, launcher)
    if cause == "no data":  # the processes try to download it one after another
        options += ["--data.name", "cifar10"]
        line = "error: cifar10 is not in"
    elif cause == "batch":
        options += ["--train.batch_size", "25"]
        line = f"error: train.batch_size 25 does not divide among {processes} processes"
    else:
        root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
        options += ["--data.name", "imagefolder", "--data.root", str(root)]
        if cause == "class":
            (root / "test" / "disc").rename(root / "test" / "disk")
            line = "error: the classes of "
        else:
            (root / "train").chmod(0)
            line = "error: "
            rights = (
                "-dac_override,-dac_read_search"  # capabilities with which root may read any file
            )
            own = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *own]
    for _ in range(3):
        done = run_command([*own, *options, "--out", str(tmp_path / "run")])
        assert done.returncode == 1
        lines = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(line)
        assert cause != "unreadable" or f"{tmp_path}/set/train" in lines[0]
        assert "stopped by a signal" not in done.stderr
