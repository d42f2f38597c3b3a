"""Downloads from a server that cuts off, stalls, lies, redirects or never ends."""

import hashlib
import shutil
import signal
import socket
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_dist.data import download as downloads
from cifar_dist.data.download import download
from cifar_dist.errors import UsageError
from tests.server import Handler, Server, answer, cut_at, endless, stall_at, without_ranges

FILE = np.random.default_rng(0).bytes(200_000)


def fetch(server: Server, target: Path) -> None:
    download(server.url(), target, len(FILE), hashlib.sha256(FILE).hexdigest())


@pytest.mark.fault(37)
def test_a_cut_connection_is_resumed(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(FILE, cut_at(50_000), cut_at(120_000))
    fetch(server, tmp_path / "file")
    assert server.requests == [0, 50_000, 120_000]
    assert (tmp_path / "file").read_bytes() == FILE
    assert not (tmp_path / "file.part").exists()


@pytest.mark.fault(37)
def test_a_connection_that_breaks_often_still_gets_there(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    cuts = range(10_000, 200_000, 10_000)
    server = serve(FILE, *map(cut_at, cuts))
    fetch(server, tmp_path / "file")
    assert server.requests == [0, *cuts]


@pytest.mark.fault(37)
def test_a_part_of_an_earlier_run_is_continued(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(FILE)
    (tmp_path / "file.part").write_bytes(FILE[:150_000])
    fetch(server, tmp_path / "file")
    assert server.requests == [150_000]
    (tmp_path / "complete.part").write_bytes(FILE)
    fetch(server, tmp_path / "complete")
    (tmp_path / "long.part").write_bytes(FILE + b"more")
    fetch(server, tmp_path / "long")
    assert server.requests == [150_000, 0]
    assert all((tmp_path / name).read_bytes() == FILE for name in ("file", "complete", "long"))


@pytest.mark.fault(37)
def test_a_server_without_ranges_is_read_from_the_start(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(FILE, cut_at(50_000), without_ranges)
    fetch(server, tmp_path / "file")
    assert server.requests == [0, 50_000]
    assert (tmp_path / "file").read_bytes() == FILE


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "step",
    [answer(416), answer(206, Content_Range="bytes 7-9/200000")],
    ids=["unsatisfiable", "another"],
)
def test_a_range_that_is_not_given_is_not_insisted_on(
    step: Callable[[Handler, int], None], serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(FILE, step)
    (tmp_path / "file.part").write_bytes(FILE[:150_000])
    fetch(server, tmp_path / "file")
    assert server.requests == [150_000, 0]


@pytest.mark.fault(37)
def test_a_wrong_hash_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    wrong = FILE[:-1] + b"?"
    server = serve(wrong)
    with pytest.raises(UsageError) as refused:
        fetch(server, tmp_path / "file")
    message = str(refused.value)
    assert hashlib.sha256(FILE).hexdigest() in message
    assert hashlib.sha256(wrong).hexdigest() in message
    assert server.url() in message
    assert server.requests == [0]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.fault(37)
def test_an_error_of_the_server_is_retried(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(FILE, answer(500), answer(503))
    fetch(server, tmp_path / "file")
    assert server.requests == [0, 0, 0]
    server.plan = [answer(500)] * 9
    with pytest.raises(
        UsageError, match="answers 500 Internal Server Error, in 4 attempts in a row"
    ):
        fetch(server, tmp_path / "other")


@pytest.mark.fault(37)
def test_the_pauses_between_attempts_grow(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(downloads, "PAUSES", (0.5, 1.0, 2.0))
    monkeypatch.setattr(downloads, "time", types.SimpleNamespace(sleep=waited.append))
    with pytest.raises(UsageError):
        fetch(serve(FILE, *[answer(500)] * 4), tmp_path / "file")
    assert waited == [0.5, 1.0, 2.0]


@pytest.mark.fault(37)
def test_a_file_that_is_not_there_is_not_retried(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(FILE, answer(404))
    with pytest.raises(UsageError, match="404 Not Found"):
        fetch(server, tmp_path / "file")
    assert server.requests == [0]


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "address",
    ["http://mirror.example/file", "http://127.0.0.1@mirror.example/file", "ftp://127.0.0.1/file"],
)
def test_a_redirect_away_from_https_is_not_followed(
    address: str,
    serve: Callable[..., Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    contacted = []
    connect = socket.create_connection

    def record(place: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
        contacted.append(place)
        return connect(place, *arguments, **options)

    monkeypatch.setattr(socket, "create_connection", record)
    server = serve(FILE, answer(302, Location=address))
    with pytest.raises(UsageError) as refused:
        fetch(server, tmp_path / "file")
    assert address in str(refused.value)
    assert contacted == [("127.0.0.1", server.server_port)]
    with pytest.raises(UsageError, match="not https"):
        download(address, tmp_path / "file", len(FILE), "")
    assert len(contacted) == 1


@pytest.mark.fault(37)
def test_a_redirect_is_followed_with_the_range(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def redirect(handler: Handler, begin: int) -> None:
        handler.start(302, Location=mirror.url())
        handler.server.closing.wait(30)  # a body that never ends: nobody may wait for it

    mirror = serve(FILE)
    server = serve(b"", redirect)
    monkeypatch.setattr(downloads, "TIMEOUT", 5)
    (tmp_path / "file.part").write_bytes(FILE[:150_000])
    fetch(server, tmp_path / "file")
    assert (server.requests, mirror.requests) == ([150_000], [150_000])


@pytest.mark.fault(37)
def test_a_stalled_server_is_left_and_asked_again(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    server = serve(FILE, stall_at(50_000))
    fetch(server, tmp_path / "file")
    assert server.requests[:2] == [0, 50_000]
    assert (tmp_path / "file").read_bytes() == FILE


@pytest.mark.fault(37)
def test_a_server_that_stalls_for_good_is_given_up(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    server = serve(FILE, *[stall_at(0)] * 9)
    with pytest.raises(UsageError, match="timed out"):
        fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.fault(37)
def test_an_endless_server_is_refused(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(FILE, endless)
    with pytest.raises(UsageError, match=f"the {len(FILE)} bytes from .* have SHA-256"):
        fetch(server, tmp_path / "file")
    server.plan = [answer(200)]
    server.content = FILE + b"more"
    for problem in ("offers 0 bytes", f"offers {len(FILE) + 4} bytes"):
        with pytest.raises(UsageError, match=f"{problem}; expected {len(FILE)}"):
            fetch(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.fault(8)
@pytest.mark.fault(37)
def test_an_interrupted_download_leaves_nothing_under_the_name(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise Interrupted

    def send_half_and_signal(handler: Handler, begin: int) -> None:
        cut_at(100_000)(handler, begin)
        deadline = time.monotonic() + 10
        while not part.exists() or part.stat().st_size < 100_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        handler.server.closing.wait(30)

    part = tmp_path / "file.part"
    server = serve(FILE, send_half_and_signal)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            fetch(server, tmp_path / "file")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "file").exists()
    fetch(server, tmp_path / "file")
    assert server.requests == [0, 100_000]
    assert (tmp_path / "file").read_bytes() == FILE


@pytest.mark.fault(37)
def test_a_disk_without_room_is_refused_before_it_is_filled(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = serve(FILE)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(UsageError) as refused:
        fetch(server, tmp_path / "file")
    assert f"0.2 MB are needed and 0.1 MB are free in {tmp_path}" in str(refused.value)
    assert server.requests == []


@pytest.mark.fault(37)
def test_a_place_that_cannot_be_written(serve: Callable[..., Server], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        fetch(serve(FILE), tmp_path / "file" / "file")
