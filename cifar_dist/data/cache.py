"""Cache of decoded datasets: arrays on disk that all processes of a machine memory-map.

A cache entry is a folder: the images, labels and digests of each split as .npy files, and meta.json
with the class names and statistics and with the size, SHA-256 and stamp of every file. An entry is
used only if all its files are unchanged; otherwise it is built again. Other files in the folder are
ignored.
"""

import errno
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from PIL import Image

from cifar_dist.config import DataConfig
from cifar_dist.data.images import Images, Source
from cifar_dist.errors import UsageError, require
from cifar_dist.files import local_path, put_in_place, replace_file, sha256_of, sync, user_id

FORMAT = 2  # version of the layout of an entry
META = "meta.json"
ATTEMPTS = 50  # to open an entry that other machines build too
CHUNK = 512  # images hashed at a time: few enough for the cache of a core


class Damaged(Exception):
    """A file of a cache entry has changed since it was written; names the file."""


class CacheWriter:
    """Collects the arrays of a dataset in a folder that becomes visible only when complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes: tuple[str, ...] = ()
        self.skipped: list[str] = []

    def create(self, split: str, labels: Sequence[int], image_size: int) -> Path:
        """Store the labels, create the image array uint8 [N, size, size, 3] and return its file.

        Raises:
            UsageError: the disk has not enough free space.
        """
        np.save(self.folder / f"{split}-labels.npy", np.asarray(labels, dtype=np.int64))
        path = self.folder / f"{split}-images.npy"
        shape = (len(labels), image_size, image_size, 3)
        needed, free = math.prod(shape), shutil.disk_usage(self.folder).free
        require(
            needed < free,
            f"the decoded {split} images need {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
            f"free in {self.folder.parents[1]}; make room, or name another folder with "
            "--data.cache",
        )
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # otherwise writing to a full disk raises SIGBUS
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return path

    def drop(self, split: str, rows: Sequence[int]) -> None:
        """Remove `rows` from a split that has been written."""
        for part in ("images", "labels"):
            path = self.folder / f"{split}-{part}.npy"
            kept = np.delete(np.load(path), list(rows), axis=0)
            np.save(path, kept)


def load_or_build(folder: Path, key: str, build: Callable[[CacheWriter], None]) -> Source:
    """Open the dataset cached as `folder`/`key`. If it is absent or damaged, build it first.

    Runs under a file lock: one process of the machine builds, the others wait and open the result.
    The entry is built in a temporary folder that is renamed at the end, so a killed process leaves
    no partial entry.

    Raises:
        UsageError: the folder cannot be written, or this user may not read the entry.
    """
    source = open_cached(folder, key)
    if source is not None:
        return source
    damage = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{key}.lock"):
            try:
                return _open(folder, key)
            except FileNotFoundError:
                pass
            except Damaged as error:
                damage = f"the cached images in {_place(folder, key)} are damaged ({error})"
                print(f"warning: {damage}; decoding them again", file=sys.stderr, flush=True)
            _build(folder, key, build)
            return _open_built(folder, key)
    except OSError as error:
        raise UsageError(
            (f"{damage}, and " if damage else "")
            + f"the cache folder {folder} cannot be written ({error.strerror or error}); "
            "name another with --data.cache"
        ) from error


def open_cached(folder: Path, key: str) -> Source | None:
    """Open the dataset cached as `folder`/`key`; return None if it is absent or damaged.

    Raises:
        UsageError: this user may not read it.
    """
    try:
        return _open(folder, key)
    except (OSError, Damaged):
        return None


def _place(folder: Path, key: str) -> Path:
    return folder / f"{key}-v{FORMAT}"


def _build(folder: Path, key: str, build: Callable[[CacheWriter], None]) -> None:
    place, own = _place(folder, key), f".{key}-{platform.node()}-"
    for work in folder.glob(f".{key}-*"):  # left by killed processes
        # The lock may not work across machines, so their builds are kept for a day.
        if work.name.startswith(own) or time.time() - work.stat().st_mtime > 86400:
            shutil.rmtree(work, ignore_errors=True)
    work = folder / f"{own}{secrets.token_hex(4)}"
    try:
        (work / "new").mkdir(parents=True)
        writer = CacheWriter(work / "new")
        build(writer)
        _write_meta(writer.folder, _describe(writer, place.name))
        if open_cached(folder, key) is None:  # otherwise another machine was faster
            put_in_place(writer.folder, place, aside=work / "damaged")
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another machine was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open_built(folder: Path, key: str) -> Source:
    """Open an existing entry, although another machine may be replacing it."""
    for _ in range(ATTEMPTS):
        with suppress(Damaged, FileNotFoundError):
            return _open(folder, key)
        time.sleep(0.02)
    return _open(folder, key)


def _describe(writer: CacheWriter, name: str) -> dict[str, Any]:
    """Return the content of meta.json; the arrays must be complete and not change any more."""
    files, measured = {}, _measure(writer.folder)
    for path in sorted(writer.folder.glob("*.npy")):
        sync(path)  # before its timestamps are read: memory-mapped writes arrive late
        with path.open("rb") as file:
            sha256, status = sha256_of(file), os.fstat(file.fileno())
        files[path.name] = {
            "size": status.st_size,
            "sha256": sha256,
            "shape": np.load(path, mmap_mode="r").shape,
            "stamp": _stamp(status),
        }
    entry = {"name": name, "classes": writer.classes, "skipped": writer.skipped}
    return {**entry, **measured, "files": files}


def _open(folder: Path, key: str) -> Source:
    """Verify the arrays of an entry and map them into memory.

    Raises:
        FileNotFoundError: there is no such entry.
        Damaged: naming the first file that is missing or differs.
        UsageError: this user may not read it.
    """
    place = _place(folder, key)
    try:
        place.lstat()
        entry, written = _read_meta(place)
        arrays = {
            name: _open_array(place / name, known, written)
            for name, known in entry["files"].items()
        }
    except PermissionError as error:
        raise UsageError(
            f"the cached images in {error.filename} cannot be read by this user "
            f"({error.strerror}); correct the permissions, or name another folder with --data.cache"
        ) from error
    statuses = {name: status for name, (_, status) in arrays.items()}
    if not all(_is_same(entry["files"][name], statuses[name], written) for name in arrays):
        _renew_stamps(place, entry, statuses)
    classes, splits = tuple(entry["classes"]), {}
    for name, (images, _) in arrays.items():
        split, _, part = name.removesuffix(".npy").rpartition("-")
        if part == "images":
            labels, digests = (arrays[f"{split}-{of}.npy"][0] for of in ("labels", "digests"))
            splits[split] = Images(images, labels, classes, digests=digests)
    return Source(
        splits, tuple(entry["mean"]), tuple(entry["std"]), entry["digest"], tuple(entry["skipped"])
    )


def _open_array(
    path: Path, known: dict[str, Any], written: int
) -> tuple[np.ndarray, os.stat_result]:
    """Return an array and the status of its file, unless it has changed since it was `written`.

    Images are read and hashed only if their stamp differs; labels and digests always are.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_size != known["size"]:
                raise Damaged(f"{path.name}: {status.st_size} bytes, expected {known['size']}")
            is_small = not path.name.endswith("-images.npy")
            if is_small or not _is_same(known, status, written):
                if sha256_of(file) != known["sha256"]:
                    raise Damaged(f"{path.name}: the SHA-256 differs")
                file.seek(0)
            if is_small:
                return np.load(file), status
            shape = tuple(known["shape"])
            # "c" keeps writes private; for read-only memory maps torch issues a warning.
            start = known["size"] - math.prod(shape)
            return np.memmap(file, np.uint8, "c", start, shape), status
    except PermissionError:
        raise
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror or error}") from error


def _stamp(status: os.stat_result) -> list[int]:
    """Return inode, mtime and ctime, which every write changes; no program can set ctime."""
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _is_same(known: dict[str, Any], status: os.stat_result, written: int) -> bool:
    """Return True if a file is certainly unchanged since it was hashed, by the rule of git's index.

    A write within the clock tick of `written`, when the stamp was stored, may not change the stamp.
    """
    return _stamp(status) == known["stamp"] and status.st_ctime_ns < written


def _renew_stamps(place: Path, entry: dict[str, Any], statuses: dict[str, os.stat_result]) -> None:
    """Store new stamps for files that were copied or restored, if the cache is writable."""
    files = {n: {**known, "stamp": _stamp(statuses[n])} for n, known in entry["files"].items()}
    with suppress(OSError):
        for name in files:
            sync(place / name)
        _write_meta(place, {**entry, "files": files})


def _write_meta(folder: Path, entry: dict[str, Any]) -> None:
    content = {"sha256": _checksum(entry), "entry": entry}
    replace_file(folder / META, json.dumps(content))


def _read_meta(place: Path) -> tuple[dict[str, Any], int]:
    """Return the entry in meta.json, and when the file was written (ctime in nanoseconds)."""
    try:
        with (place / META).open(encoding="utf-8") as file:
            content = json.load(file)
            written = os.fstat(file.fileno()).st_ctime_ns
        entry = content["entry"]
        if content["sha256"] != _checksum(entry):
            raise Damaged(f"{META}: the SHA-256 differs")
        if entry["name"] != place.name:
            raise Damaged(f"{META}: it belongs to {entry['name']}")
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{META}: {error}") from error
    return entry, written


def _checksum(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


def _measure(folder: Path) -> dict[str, Any]:
    """Hash all arrays, and compute mean and standard deviation of the training images.

    Each image is also hashed alone, into a separate array: see `Images.digests`.
    """
    digest = hashlib.sha256()
    counts = np.zeros((3, 256), dtype=np.int64)
    for path in sorted(folder.glob("*.npy")):
        array = np.load(path, mmap_mode="r")
        digest.update(path.name.encode())
        digests: list[bytes] = []
        for start in range(0, len(array), CHUNK):
            chunk = np.ascontiguousarray(array[start : start + CHUNK])
            digest.update(chunk.data)
            if chunk.ndim == 4:
                digests += [hashlib.sha256(image.data).digest()[:8] for image in chunk]
            if path.name == "train-images.npy":
                counts += count_levels(chunk)
        if digests:
            target = path.with_name(path.name.replace("-images", "-digests"))
            np.save(target, np.frombuffer(b"".join(digests), np.uint64))
    mean, std = channel_statistics(counts)
    return {"mean": mean, "std": std, "digest": digest.hexdigest()}


def count_levels(images: np.ndarray) -> np.ndarray:
    """Return the histogram of each channel of uint8 [N, H, W, 3], as int64 [3, 256].

    Uses Pillow, which is three times as fast as numpy.bincount per channel.
    """
    height, width = images.shape[1:3]
    counts = np.zeros(3 * 256, dtype=np.int64)
    step = max(1, (1 << 20) // (height * width))  # Pillow copies a few megabytes at a time
    for start in range(0, len(images), step):
        rows = images[start : start + step].reshape(-1, width, 3)
        counts += np.array(Image.fromarray(rows).histogram())
    return counts.reshape(3, 256)


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel, for values in [0, 1], from `count_levels`.

    A constant channel, or an empty dataset, gets standard deviation 1: it is then only centred.
    """
    levels = np.arange(256) / 255
    total = np.maximum(counts.sum(axis=1), 1)
    mean = counts @ levels / total
    variance = np.maximum(counts @ levels**2 / total - mean**2, 0)
    std = np.where(variance < 1e-8, 1.0, np.sqrt(variance))
    return tuple(map(float, mean)), tuple(map(float, std))


def cache_folder(config: DataConfig) -> Path:
    """Return the folder of decoded datasets: data.cache, else XDG_CACHE_HOME, else ~/.cache.

    A user without a home folder, as in a container, gets a folder in the temporary directory.

    Raises:
        UsageError: that folder belongs to another user, or others may access it.
    """
    if config.cache:
        return local_path(config.cache)
    base = os.environ.get("XDG_CACHE_HOME")
    if base or os.path.expanduser("~") != "~":
        return local_path(base or "~/.cache") / "cifar-dist"
    folder = Path(tempfile.gettempdir(), f"cifar-dist-{user_id()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    require(
        stat.S_ISDIR(found.st_mode) and (found.st_uid, found.st_mode & 0o77) == (user_id(), 0),
        f"'{folder}' is not a private folder of user {user_id()}; name another with --data.cache",
    )
    return folder
