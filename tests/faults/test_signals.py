"""Signals in every phase leave one intact checkpoint; `tests.faults.preempt` tests all cases."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest

from cifar_dist.processes.preemption import EXIT_CODE, REPEAT_SECONDS
from cifar_dist.storage.checkpoint import load_newest
from tests.faults.preempt import PHASES, SIGNALS, TARGETS, preempt
from tests.forked import start
from tests.helpers import TINY, digest_of, status_of, write_folder

# With BatchNorm, whose statistics differ between processes. 8 pixels make the test fast.
BATCHNORM = [
    *(*TINY, "--model.name", "deep", "--data.image_size", "8", "--augment.flip", "random"),
    *("--data.limit_train", "48", "--data.limit_test", "20", "--train.batch_size", "8"),
    *("--train.epochs", "2", "--checkpoint.keep", "1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the images and the uninterrupted runs of `preempt`."""
    return tmp_path_factory.mktemp("preempted")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the final weights of an uninterrupted BATCHNORM run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    with start([*BATCHNORM, "--out", str(folder / "run")], 2, folder=folder) as job:
        assert job.wait() == [0, 0], job.text()
    return digest_of(folder / "run")


@pytest.mark.fault(4, 5, 6, 7, 8)
@pytest.mark.parametrize(
    ("number", "phase", "target", "processes"),
    [
        (signal.SIGTERM, "evaluating", "launcher", 1),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in itertools.product(SIGNALS, PHASES, TARGETS, (1, 2))
        ),
    ],
)
def test_a_signal_to_a_launched_run(
    number: signal.Signals, phase: str, target: str, processes: int, folder: Path
) -> None:
    found = preempt(number, phase, target, processes, folder, again=True)
    assert found.state == "preempted"
    assert found.step == found.verified
    assert found.same
    assert found.seconds < 10


@pytest.mark.fault(5, 6, 7)
@pytest.mark.parametrize(
    ("number", "rank", "phase"),
    [
        pytest.param(signal.SIGTERM, None, "training", marks=pytest.mark.slow),
        (signal.SIGUSR1, 1, "training"),
        (signal.SIGTERM, 0, "evaluating"),
    ],
)
def test_a_signal_to_one_process_suffices_and_batchnorm_resumes_unchanged(
    number: signal.Signals, rank: int | None, phase: str, undisturbed: str, tmp_path: Path
) -> None:
    out, mark = tmp_path / "run", tmp_path / "mark"
    options = [*BATCHNORM, "--out", str(out)]
    with start(options, 2, folder=tmp_path, fault=PHASES[phase], FAULT_MARK=str(mark)) as job:
        job.wait_until(mark.exists)
        job.signal(number, rank)
        assert job.wait(20) == [EXIT_CODE, EXIT_CODE], job.text()
        assert f"; the same command with --out {out} resumes it" in job.text(0)
    status = status_of(out)
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    assert (status["state"], status["step"]) == ("preempted", newest[1].progress.step)
    if phase == "training":
        assert 3 <= status["step"] < 6
    else:  # the epoch is trained but not evaluated yet
        assert (status["step"], status["epoch"]) == (6, 0)
    with start(options, 2, folder=tmp_path) as job:
        assert job.wait() == [0, 0], job.text()
    assert digest_of(out) == undisturbed


@pytest.mark.fault(9)
def test_the_second_ctrl_c_stops_at_once_and_harms_nothing(tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = [*TINY, "--checkpoint.every_steps", "2"]
    with start([*options, "--out", str(out)], folder=tmp_path, fault="slow_steps 3") as job:
        job.wait_until(lambda: (out / "metrics.jsonl").exists() and _windows(out) >= 3, 30)
        job.signal(signal.SIGINT)
        time.sleep(REPEAT_SECONDS + 0.2)
        began = time.monotonic()
        job.signal(signal.SIGINT)
        assert job.wait(20) == [1]
        assert time.monotonic() - began < 2  # the step would sleep longer
        assert (
            job.text()
            .splitlines()[-1]
            .startswith("error: stopped at once by a second Ctrl-C at step ")
        )
        assert "Traceback" not in job.text()
    assert status_of(out)["state"] == "failed"
    for place in (out, whole):
        with start([*options, "--out", str(place)], folder=tmp_path) as job:
            assert job.wait() == [0], job.text()
    assert digest_of(out) == digest_of(whole)


@pytest.mark.fault(8)
def test_decoding_stops_before_the_remaining_images(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 120, "test": 9})
    out, mark = tmp_path / "run", tmp_path / "mark"
    options = [*TINY, "--data.name", "imagefolder", "--data.root", str(root), "--out", str(out)]
    options += ["--data.cache", str(tmp_path / "cache")]
    fault = "slow_decoding 0.5"
    with start(options, folder=tmp_path, fault=fault, FAULT_MARK=str(mark)) as job:
        job.wait_until(mark.exists)
        began = time.monotonic()
        job.signal(signal.SIGTERM)
        assert job.wait(20) == [EXIT_CODE], job.text()
        assert time.monotonic() - began < 5  # all of them would take half a minute
    assert status_of(out)["state"] == "preempted"
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


def _windows(out: Path) -> int:
    return (out / "metrics.jsonl").read_text().count("train_window")


def test_a_run_outside_the_main_thread_as_in_a_notebook(tmp_path: Path) -> None:
    import threading

    from cifar_dist.config import parse_recipe
    from cifar_dist.train import run

    results = []
    recipe, _ = parse_recipe([*TINY, "--train.epochs", "1", "--out", str(tmp_path / "run")])
    thread = threading.Thread(target=lambda: results.append(run(recipe)))
    thread.start()
    thread.join()
    assert results[0].state == "finished"
    assert os.getpid() == status_of(tmp_path / "run")["pid"]
