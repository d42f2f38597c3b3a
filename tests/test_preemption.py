"""Signals, sent for real: one whole checkpoint, nobody left behind, and the same result after."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cifar_dist import data
from cifar_dist.preemption import EXIT_CODE, REPEAT_SECONDS, Preemption
from cifar_dist.train import main
from tests.helpers import TINY, command, digest_of, run_command

# BatchNorm's statistics differ between processes; small enough for a test at 8 pixels.
BATCHNORM = ["--model.name", "deep", "--data.image_size", "8", "--augment.flip", "random"]


def stop_in_training(arguments: list[str], out: Path, number: int, rank: str | None) -> int:
    """Start a run, signal its launcher or one rank in mid-epoch, and wait until all are gone."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    launcher = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        log, deadline = out / "metrics.jsonl", time.monotonic() + 120
        while not (log.is_file() and log.read_text().count("train_window") >= 13):
            assert launcher.poll() is None, "the run ended before it could be signalled"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        everyone = [
            process
            for process in [psutil.Process(launcher.pid), *_children(launcher.pid)]
            if str(out) in process.cmdline()
        ]
        target = next(p for p in everyone if rank is None or p.environ().get("RANK") == rank)
        target.send_signal(number)
        code = launcher.wait(timeout=30)
        _, left = psutil.wait_procs(everyone, timeout=10)
        assert not left, "processes were left behind"
        return code
    finally:
        for process in (psutil.Process(p) for p in psutil.pids() if psutil.pid_exists(p)):
            try:
                if str(out) in process.cmdline():
                    process.kill()
            except psutil.Error:
                continue
        launcher.wait()


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def status_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "status.json").read_text()))


@pytest.mark.parametrize(
    ("processes", "launcher", "number", "rank", "code"),
    [
        pytest.param(
            *(1, "torchrun", signal.SIGTERM, None, EXIT_CODE),
            id="TERM to plain python",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(1, "torchrun", signal.SIGINT, None, EXIT_CODE), id="Ctrl-C", marks=pytest.mark.slow
        ),
        pytest.param(1, "accelerate", signal.SIGTERM, None, -15, id="TERM to accelerate launch"),
        pytest.param(2, "torchrun", signal.SIGUSR1, "1", 1, id="USR1 to the second of two"),
        pytest.param(
            *(2, "accelerate", signal.SIGTERM, None, 1),
            id="TERM to the launcher of two",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_signal_ends_in_a_checkpoint_and_the_same_result(
    processes: int, launcher: str, number: int, rank: str | None, code: int, tmp_path: Path
) -> None:
    options = [*TINY, *BATCHNORM, "--train.epochs", "3"]
    out = tmp_path / "stopped"
    start = [*command(processes, launcher), *options, "--out", str(out)]
    assert stop_in_training(start, out, number, rank) == code
    status = status_of(out)
    assert status["state"] == "preempted"
    assert 13 <= status["step"] < 30
    newest = max((out / "checkpoints").iterdir())
    assert newest.name == f"step-{status['step']:08d}"

    assert run_command(start).returncode == 0
    whole = [*command(processes), *options, "--out", str(tmp_path / "whole")]
    assert run_command(whole).returncode == 0
    assert status_of(out)["state"] == "finished"
    assert digest_of(out) == digest_of(tmp_path / "whole")


def test_before_training_there_is_nothing_to_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = data.load_dataset

    def interrupted(config: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(config)

    monkeypatch.setattr(data, "load_dataset", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == EXIT_CODE
    assert "stopped by a signal before training began" in capfd.readouterr().err
    assert status_of(tmp_path / "run") | {"pid": 0} == status_of(tmp_path / "run") | {"pid": 0}
    assert (status_of(tmp_path / "run")["state"], status_of(tmp_path / "run")["step"]) == (
        "preempted",
        0,
    )
    assert main([*TINY, "--out", str(tmp_path / "run")]) == EXIT_CODE  # and so on, as often
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_second_ctrl_c_stops_at_once_but_a_forwarded_one_does_not() -> None:
    preemption = Preemption()
    with preemption.listen():
        preemption.defer(processes=1, timeout=9)
        assert not preemption.agreed()
        for _ in range(2):  # the terminal's, and the launcher's copy of it
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.agreed()
        assert preemption.received == "SIGINT"
        time.sleep(REPEAT_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
