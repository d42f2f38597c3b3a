"""Real signals: one intact checkpoint, no process left behind, and the same result after."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cifar_dist import data
from cifar_dist.processes.preemption import (
    EXIT_CODE,
    REPEAT_SECONDS,
    Preempted,
    Preemption,
    uninterrupted,
)
from cifar_dist.train import main
from tests.helpers import TINY, status_of


def test_before_training_there_is_nothing_to_lose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    load = data.load_dataset

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr("cifar_dist.training.run.load_dataset", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == EXIT_CODE
    assert "stopped by a signal before training began" in capfd.readouterr().err
    status = status_of(tmp_path / "run")
    assert (status["state"], status["step"]) == ("preempted", 0)
    assert main([*TINY, "--out", str(tmp_path / "run")]) == EXIT_CODE  # and again
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted() -> None:
    reached = []

    def hold() -> None:
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append(1)
            reached.append(2)  # still within the outer block
        reached.append(3)

    preemption = Preemption()
    with preemption.listen(), preemption.interruptible():
        with pytest.raises(Preempted):
            hold()
        assert reached == [1, 2]
        with uninterrupted():  # Preempted is raised only once
            pass


def test_a_signal_that_came_during_the_imports_stops_what_follows() -> None:
    preemption = Preemption()
    with preemption.listen():
        os.kill(os.getpid(), signal.SIGTERM)  # nothing is raised here
        with pytest.raises(Preempted), preemption.interruptible():
            pytest.fail("the block was entered")


def test_the_second_ctrl_c_stops_at_once_but_a_forwarded_one_does_not() -> None:
    preemption = Preemption()
    with preemption.listen():
        preemption.defer(processes=1, timeout=9)
        assert not preemption.agreed()
        for _ in range(2):  # from the terminal, and forwarded by the launcher
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.agreed()
        assert preemption.received == "SIGINT"
        time.sleep(REPEAT_SECONDS + 0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
