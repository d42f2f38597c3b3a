"""The image files of a folder, and the name that their decoded pixels have in the cache.

Imports neither numpy nor torch, so that a process of its own can look through a large folder while
the one that trains imports them.
"""

import hashlib
import os
import stat
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from cifar_dist.config import DataConfig, local_path, require
from cifar_dist.preemption import ignore_signals, local_rank, uninterrupted

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VALIDATION = ("val", "valid", "validation")
FORMAT = "1"  # change it whenever decode_image gives other pixels for the same file


class Listing(NamedTuple):
    """The image files of a folder, always in the same order.

    Attributes:
        files: of each part, "train", "test" or "val", the paths below the folder, a list a class.
        classes: names, sorted.
        stamps: bytes and time of change (nanoseconds) of every file in turn. An array, as so many
            tuples would occupy the garbage collector.
    """

    files: dict[str, list[list[str]]]
    classes: tuple[str, ...]
    stamps: array

    def key(self, image_size: int, bad_images: str) -> str:
        """Return the name of the pixels in the cache: by every file's place, size and time."""
        what = repr((FORMAT, image_size, bad_images, self.files))
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        digest.update(self.stamps)
        return f"imagefolder-{digest.hexdigest()}"


@contextmanager
def looking_ahead(config: DataConfig) -> Iterator[Callable[[], str]]:
    """Look through a folder of images in a process of its own, while this one does other things.

    Of the processes that a launcher has started on a machine only the first does.

    Yields:
        A function that waits for the folder's `Listing.key` and returns it, or "" where that is
        not to be had: `find_images` will say why.
    """
    if config.name != "imagefolder" or local_rank() != 0:
        yield lambda: ""
        return
    code = "import sys; from cifar_dist.listing import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, config.root, str(config.side), config.bad_images]
    with uninterrupted():
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    with process:
        try:
            yield lambda: process.communicate()[0]
        finally:
            process.kill()


def main(root: str, image_size: str, bad_images: str) -> None:
    """Print the key of a folder."""
    ignore_signals()
    listing = find_images(local_path(root))
    print(listing.key(int(image_size), bad_images), end="")


def find_images(root: Path) -> Listing:
    """List the image files of each part by class. With one of test and val only, it is "test".

    Args:
        root: holds train and test (or val, valid, validation) with class folders in each, or
            class folders directly, which are then all "train".
    """
    parts = {name: root / name for name in ("train", "test") if (root / name).is_dir()}
    for name in VALIDATION:
        if (root / name).is_dir():
            parts["val" if "test" in parts else "test"] = root / name
            break
    parts = parts or {"train": root}
    names = {split: _class_names(folder) for split, folder in parts.items()}
    first = next(iter(names))
    for split, found in names.items():
        missing, extra = set(names[first]) - set(found), set(found) - set(names[first])
        require(
            not missing and not extra,
            f"the classes of {parts[first]} and {parts[split]} differ: "
            + "; ".join(
                f"{what} in {split}: {', '.join(sorted(which))}"
                for what, which in (("missing", missing), ("only", extra))
                if which
            ),
        )
    require(
        len(names[first]) >= 2,
        f"{parts[first]} holds {len(names[first])} class folders; at least 2 are needed",
    )
    files: dict[str, list[list[str]]] = {split: [] for split in parts}
    stamps = array("q")
    for split, folder in parts.items():
        for name in names[split]:
            below = (folder / name).relative_to(root)
            found = _scan(os.fspath(folder / name), f"{below}/", stamps)
            require(
                bool(found),
                f"class folder {folder / name} holds no image; add some "
                f"({', '.join(sorted(SUFFIXES))}) or remove the folder",
            )
            files[split].append(found)
    return Listing(files, tuple(names[first]), stamps)


def labels_of(found: list[list[str]]) -> list[int]:
    """Return the label of each file of a part."""
    return [label for label, images in enumerate(found) for _ in images]


def list_images(folder: Path) -> list[Path]:
    """Return the image files in and below a folder, sorted."""
    return [folder / path for path in _scan(os.fspath(folder), "", array("q"))]


def _scan(folder: str, prefix: str, stamps: array) -> list[str]:
    """Find image files, and add what changes with them to `stamps`. At each start: be quick."""
    found: list[str] = []
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        for name in sorted(os.listdir(descriptor)):
            is_image = name[name.rfind(".") :].lower() in SUFFIXES
            try:
                status = os.stat(name, dir_fd=descriptor)
            except OSError:  # a broken link: decoding will say so
                if is_image:
                    found.append(prefix + name)
                    stamps.extend((0, 0))
                continue
            if stat.S_ISDIR(status.st_mode):
                below = os.path.join(folder, name)
                if not os.path.islink(below):
                    found += _scan(below, f"{prefix}{name}/", stamps)
            elif is_image:
                found.append(prefix + name)
                stamps.append(status.st_size)
                stamps.append(status.st_mtime_ns)
    finally:
        os.close(descriptor)
    return found


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )
