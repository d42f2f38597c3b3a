"""Files and folders that are whole or absent: written beside their place, synced, then renamed."""

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

    After a power cut `target` is what it was, or all of the new, or absent where `aside` was used.

    Args:
        aside: where an existing `target` is moved; a folder cannot be replaced in one step.
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
    """Write a file so that a reader sees the old content or the new, never a part."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk.

    Folders that cannot be opened (on Windows none can) or synced (on some file systems) are left
    to the operating system.
    """
    is_folder = path.is_dir()
    try:
        # Windows syncs only what is open for writing.
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
    """Return the SHA-256 of what is left to read of a file, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def local_path(place: str) -> Path:
    """Return a path as the user means it: ~ and ~USER at its beginning are home folders.

    As in a shell, a name such as ~new that is no user's is an ordinary name.

    Raises:
        UsageError: it begins with ~, and this user has no home folder.
    """
    path = Path(os.path.expanduser(place))
    require(
        path.parts[:1] != ("~",),
        f"'{place}' begins with ~, but HOME is not set and user {user_id()} has no home folder; "
        "give a path without ~, or set HOME",
    )
    return path


def user_id() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0  # Windows has none
