"""Download one file of known SHA-256, once for all processes of a machine."""

import http.client
import socket
import sys
import urllib.error
from pathlib import Path

import filelock

from cifar_dist.errors import UsageError, one_line
from cifar_dist.files import put_in_place

TIMEOUT = 30.0  # seconds without data after which the connection is given up


def download(url: str, target: Path, sha256: str) -> None:
    """Download `url` to `target` if that does not exist.

    Runs under a file lock: one process downloads, the others wait for the file. The file appears
    under its name only after its SHA-256 has been verified.

    Args:
        url: address of the file. Its integrity rests on `sha256`, not on the server.
        sha256: of the whole file, in hexadecimal.

    Raises:
        UsageError: the server cannot be reached or fails, the file has another SHA-256, or the
            disk is full or cannot be written.
    """
    from torch.hub import download_url_to_file

    part = target.with_name(f"{target.name}.part")
    timeout = socket.getdefaulttimeout()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f"{target.name}.lock")):
            if target.exists():
                return
            for leftover in target.parent.glob(f"{part.name}*"):  # of a process that was killed
                leftover.unlink()
            socket.setdefaulttimeout(TIMEOUT)  # torch.hub would wait forever
            download_url_to_file(url, str(part), sha256, progress=sys.stderr.isatty())
            put_in_place(part, target)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise UsageError(f"{url} to {target}: {one_line(error, None)}") from error
    finally:
        socket.setdefaulttimeout(timeout)
