"""Full and read-only disks, and failing logs and trackers, on real small file systems."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cifar_dist.storage.checkpoint import checkpoints_in, verify
from tests.forked import Job, start
from tests.helpers import TINY, digest_of, read_lines, status_of, write_folder

OPTIONS = [*TINY, "--checkpoint.every_steps", "2", "--train.epochs", "2", "--checkpoint.keep", "1"]
BOARD = ["--track.log_with", "[tensorboard]"]
Mount = Callable[..., Path]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the final weights of an uninterrupted run of OPTIONS."""
    folder = tmp_path_factory.mktemp("whole")
    with start([*OPTIONS, "--out", str(folder / "run")], folder=folder) as job:
        assert job.wait() == [0], job.text()
    return digest_of(folder / "run")


def fill(folder: Path) -> Path:
    """Fill up a file system."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def start_on(small: Path, logs: Path) -> Job:
    """Start a slow run there, and fill the disk once there is a checkpoint."""
    job = start([*OPTIONS, "--out", str(small / "run")], folder=logs, fault="slow_steps 0.1")
    job.wait_until(lambda: bool(checkpoints_in(small / "run" / "checkpoints")))
    job.signal(signal.SIGSTOP)
    fill(small)
    job.signal(signal.SIGCONT)
    return job


@pytest.mark.fault(14)
def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_was_saved(
    mounted: Mount, tmp_path: Path, undisturbed: str
) -> None:
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=12m", "tmpfs")
    with start_on(small, tmp_path) as job:
        assert job.wait(60) == [1]
        text = job.text()
    assert text.count("warning: the checkpoint of step") == 3
    last = text.splitlines()[-1]
    assert "was not saved: disk full: " in last
    assert (
        f"MB needed, 0.0 MB free at '{small / 'run' / 'checkpoints'}' (3 failed in a row)" in last
    )
    kept = checkpoints_in(small / "run" / "checkpoints")
    assert [len(verify(path)) for path in kept] == [4] * len(kept) != []
    status = status_of(small / "run")
    assert (status["state"], f"error: {status['message']}") == ("failed", last)

    (small / "filler").unlink()
    with start([*OPTIONS, "--out", str(small / "run")], folder=tmp_path) as job:
        assert job.wait() == [0]
        assert "continues at step" in job.text()
    assert digest_of(small / "run") == undisturbed


@pytest.mark.fault(14)
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    mounted: Mount, tmp_path: Path, undisturbed: str
) -> None:
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=12m", "tmpfs")
    with start_on(small, tmp_path) as job:
        job.wait_until(lambda: "was not saved" in job.text())
        (small / "filler").unlink()
        assert job.wait(60) == [0], job.text()
    assert digest_of(small / "run") == undisturbed
    assert status_of(small / "run")["state"] == "finished"


@pytest.mark.fault(14)
def test_a_full_disk_is_found_before_anything_is_decoded(mounted: Mount, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 30, "test": 9})
    small = mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    options = [*TINY, "--data.name", "imagefolder", "--data.root", str(root)]
    options += ["--data.cache", str(small), "--out", str(tmp_path / "run")]
    with start(options, folder=tmp_path) as job:
        assert job.wait() == [2]
        text = job.text()
    assert "error: the decoded train images need 0.1 MB, and 0." in text
    assert text.count("\n") == 1
    assert not list(small.glob(".imagefolder*"))
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(15)
def test_a_full_disk_under_tensorboard_changes_no_weights(
    mounted: Mount, tmp_path: Path, undisturbed: str
) -> None:
    out, board = tmp_path / "run", tmp_path / "board"
    mounted(board, "-t", "tmpfs", "-o", "size=32k", "tmpfs")
    options = [*OPTIONS, *BOARD, "--out", str(out)]
    with start(options, folder=tmp_path, fault=f"events_in {board}") as job:
        assert job.wait() == [0], job.text()
        assert job.text().count("warning: ") == 1
        assert "warning: the tracker tensorboard failed, training goes on" in job.text()
    assert digest_of(out) == undisturbed
    notices = [line for line in read_lines(out) if line["split"] == "notice"]
    assert len(notices) == 1
    assert "tensorboard failed" in notices[0]["message"]


@pytest.mark.fault(17)
@pytest.mark.parametrize("kind", ["a file", "read-only"])
def test_an_unwritable_folder_of_events_is_warned_of_once(
    kind: str, mounted: Mount, tmp_path: Path, undisturbed: str
) -> None:
    out, board = tmp_path / "run", tmp_path / "board"
    if kind == "a file":
        board.write_text("")
    else:
        mounted(board, "-t", "tmpfs", "-o", "ro", "tmpfs")
    options = [*OPTIONS, *BOARD, "--out", str(out)]
    with start(options, folder=tmp_path, fault=f"events_in {board}") as job:
        assert job.wait() == [0], job.text()
        assert job.text().count("warning: ") == 1
        assert "failed, training goes on" in job.text()
    assert digest_of(out) == undisturbed


@pytest.mark.fault(17)
def test_a_tracker_that_raises_changes_no_weights(tmp_path: Path, undisturbed: str) -> None:
    out = tmp_path / "run"
    options = [*OPTIONS, *BOARD, "--out", str(out)]
    with start(options, folder=tmp_path, fault="broken_tracker") as job:
        assert job.wait() == [0], job.text()
        assert job.text().count("warning: ") == 1
        assert "the tracker is gone" in job.text()
    assert digest_of(out) == undisturbed


@pytest.mark.fault(16)
@pytest.mark.parametrize("kind", ["read-only", "a file", "below a file", "dangling link"])
def test_an_unusable_run_folder_is_refused_before_the_data_are_read(
    kind: str, mounted: Mount, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    if kind == "read-only":
        mounted(place, "-t", "tmpfs", "-o", "ro", "tmpfs")
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.write_text("")
    out = place if kind in ("a file", "dangling link") else place / "run"
    began = time.monotonic()
    with start([*TINY, "--out", str(out)], folder=tmp_path, fault="slow_start 30") as job:
        assert job.wait(20) == [2]
        text = job.text()
    assert text.startswith(f"error: the run folder '{out}' cannot be used: '{place}' ")
    assert text.count("\n") == 1
    assert time.monotonic() - began < 10  # loading the dataset would take 30 s


@pytest.mark.fault(39)
def test_two_runs_in_one_folder(tmp_path: Path, undisturbed: str) -> None:
    out = tmp_path / "run"
    options = [*OPTIONS, "--out", str(out)]
    with start(options, folder=tmp_path / "first", fault="slow_steps 0.3") as first:
        first.wait_until(lambda: bool(checkpoints_in(out / "checkpoints")))
        before = status_of(out)
        with start(options, folder=tmp_path / "second") as second:
            assert second.wait() == [2]
            pid = first.processes[0].pid
            assert f"'{out}' is in use by process {pid} on {os.uname().nodename}" in second.text()
        assert status_of(out)["pid"] == before["pid"]
        first.kill()
    with start(options, folder=tmp_path / "third") as third:  # the lock of the killed run is gone
        assert third.wait() == [0], third.text()
    assert digest_of(out) == undisturbed


@pytest.mark.fault(40)
def test_odd_paths_and_a_clock_that_runs_backwards(tmp_path: Path, undisturbed: str) -> None:
    out = tmp_path / "ein Lauf, günstig 🙂" / ("lang" * 50) / "--out"
    with start([*OPTIONS, f"--out={out}"], folder=tmp_path, fault="clock_set_back") as job:
        assert job.wait() == [0], job.text()
    assert digest_of(out) == undisturbed
    speeds = [line["images_per_second"] for line in read_lines(out) if "window" in line["split"]]
    assert all(speed > 0 for speed in speeds)
