"""`cifar-dist train --processes N`: the processes, the exit codes, and the last lines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.errors import UsageError
from cifar_dist.launching.options import Launch, split_options
from tests.helpers import TINY, digest_of, free_port, status_of

TRAIN = [sys.executable, "-m", "cifar_dist", "train"]
CRASHES = """
import os
import signal
from torch import nn

class Raises(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        if self.calls > 5:
            self.end()
        return super().forward(images)

    def end(self):
        raise RuntimeError("deliberate")

class LosesOne(Raises):
    def end(self):
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

class LosesAll(Raises):
    def end(self):
        os.kill(os.getpid(), signal.SIGKILL)
"""
SEVERAL = [pytest.param(n, marks=[] if n == 2 else pytest.mark.slow) for n in (1, 2, 8)]


def start(processes: int, *options: str) -> subprocess.Popen[str]:
    several = ["--processes", str(processes)]
    batch = ["--train.batch_size", "32"]
    return subprocess.Popen(
        [*TRAIN, *TINY, *batch, *several, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str]]:
    """Return the exit code and the lines on stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out.splitlines(), err.splitlines()


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_refused_request_is_one_line(processes: int, tmp_path: Path) -> None:
    options = ["--data.name", "imagefolder", "--data.root", "/nowhere", "--out", f"{tmp_path}/run"]
    code, out, err = ended(start(processes, *options))
    assert (code, out) == (2, [])
    assert err == [f"error: {err[-1].removeprefix('error: ')}"]
    assert "data.root '/nowhere' is not a folder" in err[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_crash_ends_with_the_first_traceback_and_one_line(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("crashes.py").write_text(CRASHES)
    code, _, err = ended(start(processes, "--model.name", "crashes.py:Raises", "--out", "run"))
    assert code == 1
    assert err[0] == "Traceback (most recent call last):"
    assert err.count("Traceback (most recent call last):") == 1
    assert err[-2] == "RuntimeError: deliberate"
    assert "RuntimeError: deliberate (crashes.py:18)" in err[-1]
    assert err[-1].startswith("error: failed" if processes == 1 else "error: rank ")
    assert status_of(tmp_path / "run")["message"] == err[-1].removeprefix("error: ")


@pytest.mark.parametrize("network", ["LosesOne", pytest.param("LosesAll", marks=pytest.mark.slow)])
def test_killed_processes_are_reported_in_one_line(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("crashes.py").write_text(CRASHES)
    code, _, err = ended(start(2, "--model.name", f"crashes.py:{network}", "--out", "run"))
    assert code == 1
    assert len(err) == 1
    assert err[0].startswith("error: rank ")
    assert "exited without an error message (probably killed by the OOM killer)" in err[0]
    assert "closing signal SIGTERM" in Path("run/logs/launcher.log").read_text() or (
        network == "LosesAll"
    )


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(8, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_preempted_run_ends_with_one_line_and_75_and_resumes(
    processes: int, number: signal.Signals, tmp_path: Path
) -> None:
    options = ["--train.epochs", "12", "--checkpoint.keep", "99"]
    code, *_ = ended(start(processes, *options, "--out", str(tmp_path / "whole")))
    assert code == 0
    job = start(processes, *options, "--out", str(tmp_path / "run"))
    while not any((tmp_path / "run" / "checkpoints").glob("step-*")):
        time.sleep(0.1)
        assert job.poll() is None
    job.send_signal(number)
    code, out, err = ended(job)
    assert (code, err) == (75, [])
    assert out[-1].startswith("preempted at step ")
    assert out[-1].endswith(f"the same command with --out {tmp_path}/run resumes it")
    assert ended(start(processes, *options, "--out", str(tmp_path / "run")))[0] == 0
    assert digest_of(tmp_path / "run") == digest_of(tmp_path / "whole")


@pytest.mark.slow
def test_without_out_the_run_folder_is_named_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = ended(start(2, "--train.epochs", "1"))
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 0
    assert run.name.startswith("smoke-")
    assert f"finished at step 10: runs/{run.name}" in out


@pytest.mark.slow
def test_two_machines(tmp_path: Path) -> None:
    several = ["--machines", "2", "--address", f"127.0.0.1:{free_port()}"]
    out = ["--out", str(tmp_path / "run")]
    jobs = [start(1, *several, "--machine-rank", str(rank), *out) for rank in (0, 1)]
    results = [ended(job) for job in jobs]
    assert [code for code, *_ in results] == [0, 0], results
    assert "2 processes on cpu" in "\n".join(results[0][1])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--processes", "two"], "--processes is 'two'; give a number of processes, or auto"),
        (["--processes", "0"], "--processes is '0'"),
        (["--processes"], "--processes: expected one argument; see cifar-dist train --help"),
        (["--machines", "2"], "--machines needs --address HOST:PORT of the first machine"),
        (["--machines", "2", "--address", "a:b"], "--machines needs --address HOST:PORT of"),
        (["--machines", "2", "--address", "a"], "such as 10.0.0.1:29500"),
        (["--machines", "2", "--address", "a:1"], "--machines needs --machine-rank, 0 on the"),
        (["--machines", "2", "--address", "a:1", "--machine-rank", "2"], "give 0 to 1"),
        (["--machines", "0"], "--machines is 0; give 1 or more"),
        (["--address", "a:1"], "--address needs --machines"),
        (["--machine-rank", "1"], "--machine-rank needs --machines"),
    ],
)
def test_invalid_options_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        split_options(argv)
    assert message in str(refused.value)


def test_options_of_the_launch_are_taken_from_the_others() -> None:
    assert split_options(["tutorial", "--processes", "3", "--out", "x"]) == (
        Launch(3),
        ["tutorial", "--out", "x"],
    )
    assert split_options(["--processes", "auto"]) == (Launch(), [])  # no GPUs: in this process
    assert split_options(["--processes", "1"]) == (Launch(), [])


def test_processes_cannot_start_processes() -> None:
    done = subprocess.run(
        [*TRAIN, "--processes", "2"],
        env={**os.environ, "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "a launcher has already started this one; remove --processes" in done.stderr


def test_a_batch_that_does_not_divide_is_refused_before_the_start(tmp_path: Path) -> None:
    code, out, err = ended(start(3, "--out", str(tmp_path / "run")))
    assert (code, out) == (2, [])
    assert err[0].startswith("error: train.batch_size 32 does not divide among 3 processes")
