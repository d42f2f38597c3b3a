"""Atomic writes: a file or folder is written beside its place, synced, and then renamed."""

import errno
import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

from cifar_dist.errors import require


def put_in_place(written: Path, target: Path, aside: Path | None = None) -> None:
    """Sync a file, or a folder with the files in it, and rename it to `target`.

    After a power cut `target` is either old or new and complete. With `aside` it may be missing.

    Args:
        aside: an existing `target` is moved here first, because rename cannot replace a folder.
    """
    if written.is_dir():
        for path in written.iterdir():
            sync(path)
    sync(written)
    if aside is not None:
        with suppress(FileNotFoundError):
            os.replace(target, aside)
    os.replace(written, target)
    sync(target.parent)


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees either the old or the new content."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to disk with fsync.

    A folder is skipped if it cannot be opened (on Windows) or synced (on some file systems).
    """
    is_folder = path.is_dir()
    try:
        # Windows syncs only files that are open for writing.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not is_folder:
            raise
    finally:
        os.close(descriptor)


def sha256_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of a file from its current position on, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def local_path(place: str) -> Path:
    """Return a path with a leading ~ or ~USER replaced by the home folder, as in a shell.

    ~NAME is an ordinary file name if there is no user NAME.

    Raises:
        UsageError: the path begins with ~, and this user has no home folder.
    """
    path = Path(os.path.expanduser(place))
    require(
        path.parts[:1] != ("~",),
        f"'{place}' begins with ~, but HOME is not set and user {user_id()} has no home folder; "
        "give a path without ~, or set HOME",
    )
    return path


def user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows has no getuid
