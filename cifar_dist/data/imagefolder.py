"""A folder of class folders: found, checked, and decoded once into the cache."""

import hashlib
import os
import stat
from array import array
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from cifar_dist.config import DataConfig, cache_folder, require
from cifar_dist.data.cache import CacheWriter, load_or_build
from cifar_dist.data.decode import decode_files
from cifar_dist.data.images import Source

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


def load_imagefolder(config: DataConfig) -> Source:
    """Return the images below data.root, decoded into the cache on the first use.

    Raises:
        UsageError: a folder is missing, a class is empty or missing in one part, or a file cannot
            be decoded and data.bad_images is stop.
    """
    root = Path(config.root).expanduser()
    require(root.is_dir(), f"data.root '{config.root}' is not a folder; name one of class folders")
    size = config.image_size or 32
    files, classes, stamps = find_images(root)

    def build(writer: CacheWriter) -> None:
        writer.classes = classes
        for split, found in files.items():
            labels = labels_of(found)
            target = writer.create(split, labels, size)
            paths = [os.path.join(root, path) for path in chain(*found)]
            failures = decode_files(paths, target, f"decoding {split}")
            if not failures:
                continue
            reasons = [f"{paths[row]}: {why}" for row, why in failures.items()]
            require(
                config.bad_images == "skip",
                f"{len(failures)} of the {split} images cannot be decoded, the first {reasons[0]}; "
                "mend or remove them, or leave them out with --data.bad_images skip",
            )
            left = {label for row, label in enumerate(labels) if row not in failures}
            for label, name in enumerate(classes):
                require(label in left, f"no image of class '{name}' in {split} can be decoded")
            writer.drop(split, list(failures))
            writer.skipped += reasons

    # The decoded pixels are known by every file's place, size and time of change.
    digest = hashlib.blake2b(
        repr((FORMAT, size, config.bad_images, files)).encode(), digest_size=16
    )
    digest.update(stamps)
    key = f"imagefolder-{digest.hexdigest()}"
    return load_or_build(cache_folder(config), key, build)


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
