"""Downloads from a server that fails, cuts off, stalls or sends another file."""

import errno
import hashlib
import io
import signal
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cifar_dist.data import download as downloads
from cifar_dist.data.download import download
from cifar_dist.errors import UsageError
from tests.server import Handler, Server, Step, answer, cut_at, stall_at

FILE = np.random.default_rng(0).bytes(200_000)


def fetch(server: Server, target: Path) -> None:
    download(server.url(), target, hashlib.sha256(FILE).hexdigest())


def names_in(folder: Path) -> list[str]:
    """Return the names of the files in a folder, without the lock."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def test_a_file_is_downloaded_once(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(FILE)
    leftover = tmp_path / "file.part.0123.partial"  # of a process that was killed
    leftover.write_bytes(FILE[:100])
    for _ in range(2):
        fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == FILE
    assert names_in(tmp_path) == ["file"]
    assert server.requests == 1


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (answer(500), "HTTP Error 500"),
        (answer(404), "HTTP Error 404"),
        (cut_at(0), "invalid hash value"),
        (cut_at(150_000), "invalid hash value"),
        (stall_at(50_000), "timed out"),
        (lambda handler: None, "closed connection without response"),
    ],
    ids=["error", "absent", "empty", "cut", "stalled", "silent"],
)
def test_a_server_that_fails_is_one_line_and_leaves_nothing(
    step: Step,
    problem: str,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    server = serve(FILE, step)
    with pytest.raises(UsageError, match=problem) as refused:
        fetch(server, tmp_path / "file")
    assert "\n" not in str(refused.value)
    assert server.url() in str(refused.value)
    assert names_in(tmp_path) == []
    fetch(server, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == FILE


@pytest.mark.fault(37)
def test_a_wrong_hash_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    wrong = FILE[:-1] + b"?"
    with pytest.raises(UsageError) as refused:
        fetch(serve(wrong), tmp_path / "file")
    for content in (FILE, wrong):
        assert hashlib.sha256(content).hexdigest() in str(refused.value)
    assert names_in(tmp_path) == []


@pytest.mark.fault(8)
@pytest.mark.fault(37)
def test_an_interrupted_download_leaves_nothing(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise Interrupted

    def send_half_and_signal(handler: Handler) -> None:
        cut_at(100_000)(handler)
        deadline = time.monotonic() + 10
        while not any(tmp_path.glob("*.partial")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        handler.server.closing.wait(30)

    server = serve(FILE, send_half_and_signal)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            fetch(server, tmp_path / "file")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert names_in(tmp_path) == []


@pytest.mark.fault(37)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Full(io.FileIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.hub.open", Full, raising=False)
    with pytest.raises(UsageError, match="No space left on device"):
        fetch(serve(FILE), tmp_path / "file")
    assert names_in(tmp_path) == []


@pytest.mark.fault(37)
def test_a_place_that_cannot_be_written(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"File exists|Not a directory"):
        fetch(serve(FILE), tmp_path / "file" / "file")
