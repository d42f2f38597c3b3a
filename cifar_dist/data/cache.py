"""Decode once: datasets as arrays on disk that every process of a machine maps into its memory."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import numpy as np
from PIL import Image

from cifar_dist.config import UsageError, require
from cifar_dist.data.images import Images, Source

CHUNK = 512  # images handled at a time when measuring: few enough to stay in a core's cache


class CacheWriter:
    """Collects the arrays of a dataset in a folder that becomes visible only when complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes: tuple[str, ...] = ()
        self.skipped: list[str] = []

    def create(self, split: str, labels: Sequence[int], image_size: int) -> Path:
        """Store the labels and return the file of the images' array, uint8 [N, size, size, 3].

        Raises:
            UsageError: there is no room for it.
        """
        np.save(self.folder / f"{split}-labels.npy", np.asarray(labels, dtype=np.int64))
        path = self.folder / f"{split}-images.npy"
        shape = (len(labels), image_size, image_size, 3)
        needed, free = math.prod(shape), shutil.disk_usage(self.folder).free
        require(
            needed < free,
            f"the decoded {split} images need {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are "
            f"free in {self.folder.parent}; make room, or name another folder with --data.cache",
        )
        np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # else a disk that fills up ends a mapping by SIGBUS
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return path

    def drop(self, split: str, rows: Sequence[int]) -> None:
        """Remove `rows` from a split written before."""
        for part in ("images", "labels"):
            path = self.folder / f"{split}-{part}.npy"
            kept = np.delete(np.load(path), list(rows), axis=0)
            np.save(path, kept)


def load_or_build(folder: Path, key: str, build: Callable[[CacheWriter], None]) -> Source:
    """Open the dataset cached as `folder`/`key`; if it is absent, build it first.

    Under a lock: one process of the machine builds, the others wait and open the result. The
    build happens in a temporary folder that is renamed at the end, so a killed one leaves nothing.

    Raises:
        UsageError: the folder cannot be written.
    """
    if not is_cached(folder, key):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(folder / f"{key}.lock"):
                if not is_cached(folder, key):
                    _build(folder, key, build)
        except OSError as error:
            raise UsageError(
                f"the cache folder {folder} cannot be written ({error.strerror}); "
                "name another with --data.cache"
            ) from error
    return open_cached(folder, key)


def is_cached(folder: Path, key: str) -> bool:
    """Say whether `folder` holds the dataset `key`; what is there is whole."""
    return (folder / key / "meta.json").is_file()


def _build(folder: Path, key: str, build: Callable[[CacheWriter], None]) -> None:
    for abandoned in folder.glob(f".{key}-*"):  # of a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder))
    try:
        writer = CacheWriter(temporary)
        build(writer)
        meta = {"classes": writer.classes, "skipped": writer.skipped, **_measure(temporary)}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, folder / key)
    except OSError:
        if not is_cached(folder, key):  # else another machine was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_cached(folder: Path, key: str) -> Source:
    """Open the dataset cached as `folder`/`key`, its images mapped into memory."""
    target = folder / key
    meta = json.loads((target / "meta.json").read_text(encoding="utf-8"))
    classes = tuple(meta["classes"])
    splits = {}
    for path in sorted(target.glob("*-images.npy")):
        split = path.name.removesuffix("-images.npy")
        # "c": writes stay private; torch warns about arrays that are mapped read-only.
        images = np.load(path, mmap_mode="c")
        labels = np.load(target / f"{split}-labels.npy")
        digests = np.load(target / f"{split}-digests.npy")
        splits[split] = Images(images, labels, classes, digests=digests)
    return Source(
        splits, tuple(meta["mean"]), tuple(meta["std"]), meta["digest"], tuple(meta["skipped"])
    )


def _measure(folder: Path) -> dict[str, object]:
    """Hash all arrays, and take mean and deviation of the training images from exact counts.

    Each image is hashed by itself too: see `Images.digests`.
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
    """Count how often each channel of uint8 [N, H, W, 3] has each level; int64 [3, 256].

    By Pillow, which is three times as fast as three calls of numpy.bincount.
    """
    height, width = images.shape[1:3]
    counts = np.zeros(3 * 256, dtype=np.int64)
    step = max(1, (1 << 20) // (height * width))  # Pillow copies: a few megabytes at a time
    for start in range(0, len(images), step):
        rows = images[start : start + step].reshape(-1, width, 3)
        counts += np.array(Image.fromarray(rows).histogram())
    return counts.reshape(3, 256)


def channel_statistics(counts: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation per channel, in [0, 1], from `count_levels`.

    A channel without variation, or no images at all, gets deviation 1: it is then only centred.
    """
    levels = np.arange(256) / 255
    total = np.maximum(counts.sum(axis=1), 1)
    mean = counts @ levels / total
    variance = np.maximum(counts @ levels**2 / total - mean**2, 0)
    std = np.where(variance < 1e-8, 1.0, np.sqrt(variance))
    return tuple(map(float, mean)), tuple(map(float, std))
