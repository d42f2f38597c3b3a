"""Download one file of known size and SHA-256: over https, resumable, once for all processes."""

import http.client
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import IO

import filelock

from cifar_dist.errors import UsageError, require
from cifar_dist.files import put_in_place, sha256_of

TIMEOUT = 30.0  # seconds without a byte until a connection is given up
PAUSES = (0.5, 1.0, 2.0)  # seconds to wait after each attempt in a row that brings nothing new
BLOCK = 1 << 16  # bytes handled at a time
LOOPBACK = ("127.0.0.1", "localhost")  # does not leave the machine, so plain http is as good there
# What another attempt may mend. No plain OSError: a full disk, say, stays full.
TRANSIENT = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    ValueError,  # a malformed header or address
)


def download(url: str, target: Path, size: int, sha256: str) -> None:
    """Download `url` unless `target` exists; under its name there is never anything unverified.

    Under a lock: one process downloads, the others wait and find the file. What an interrupted
    download has received stays beside the target, as .part, and is continued by the next one.

    Args:
        url: https, as must be every address that it redirects to.
        size: of the whole file in bytes; no more than that is read.
        sha256: of the whole file, in hexadecimal.

    Raises:
        UsageError: it cannot be had, it is not the file that was expected, or the disk is full.
    """
    _require_secure(url)
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                _require_space(part, size)
                _fetch(url, part, size)
                _verify(url, part, size, sha256)
                put_in_place(part, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error


def _require_secure(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    secure = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)
    require(secure, f"the address {url} is not https, and nothing else is trusted")


def _require_space(part: Path, size: int) -> None:
    needed = size - _size(part)
    free = shutil.disk_usage(part.parent).free
    require(
        needed <= free,
        f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free in {part.parent}; "
        "make room there",
    )


def _fetch(url: str, part: Path, size: int) -> None:
    """Bring `part` to its full size, over as many connections as bring it further."""
    reached, failures = _size(part), 0
    while problem := _attempt(url, part, size):
        if _size(part) > reached:
            reached, failures = _size(part), 0
        require(failures < len(PAUSES), f"{url}: {problem}, in {failures + 1} attempts in a row")
        time.sleep(PAUSES[failures])
        failures += 1


def _attempt(url: str, part: Path, size: int) -> str:
    """Continue `part` over one connection.

    Returns:
        What went wrong if another attempt may mend it, else "".
    """
    have = _size(part)
    if have == size:
        return ""
    if have > size:  # not ours
        part.unlink()
        have = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.build_opener(_SecureRedirects).open(request, timeout=TIMEOUT) as answer:
            return _receive(url, answer, part, have, size)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the file over there ends before ours: not the same
            part.unlink()
        elif error.code < 500:
            raise UsageError(f"{url} answers {error.code} {error.reason}") from error
        return f"the server answers {error.code} {error.reason}"
    except TRANSIENT as error:
        return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def _receive(url: str, answer: http.client.HTTPResponse, part: Path, have: int, size: int) -> str:
    """Append an answer's body to the first `have` bytes; returns as `_attempt` does."""
    from tqdm import tqdm

    if answer.status != 206:
        have = 0  # the server knows no ranges and sends it all again
    elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        return "the server sent another range than it was asked for"
    length = answer.headers["Content-Length"]
    if length is not None:  # tells a log-in page from the file before anything is written
        offered = have + int(length)
        require(offered == size, f"{url} offers {offered} bytes; expected {size}")
    with (
        part.open("ab" if have else "wb") as file,
        tqdm(
            desc=part.stem,
            initial=have,
            total=size,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        # read1: what has arrived is written even if the rest never comes.
        while have < size and (block := answer.read1(min(BLOCK, size - have))):
            file.write(block)
            have += len(block)
            bar.update(len(block))
    return "" if have == size else f"the connection ended after {have} of {size} bytes"


def _verify(url: str, part: Path, size: int, sha256: str) -> None:
    with part.open("rb") as file:
        found = sha256_of(file)
    if found != sha256:
        part.unlink()
        raise UsageError(
            f"the {size} bytes from {url} have SHA-256 {found}, expected {sha256}; they are "
            "removed, and another try starts from nothing"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        fp.close()  # urllib would read the redirect's own body to its end, if it has one
        _require_secure(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
