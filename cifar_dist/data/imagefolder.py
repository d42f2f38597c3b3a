"""A folder of class folders: found, checked, and decoded once into the cache."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from cifar_dist.config import DataConfig, cache_folder, require
from cifar_dist.data.cache import CacheWriter, load_or_build
from cifar_dist.data.decode import decode_files
from cifar_dist.data.images import Source

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VALIDATION = ("val", "valid", "validation")
FORMAT = "1"  # change it whenever decode_image gives other pixels for the same file

# path, label, bytes, time of change in nanoseconds
Files = dict[str, list[tuple[str, int, int, int]]]


def load_imagefolder(config: DataConfig) -> Source:
    """Return the images below data.root, decoded into the cache on the first use.

    Raises:
        UsageError: a folder is missing, a class is empty or missing in one part, or a file cannot
            be decoded and data.bad_images is stop.
    """
    root = Path(config.root).expanduser()
    require(root.is_dir(), f"data.root '{config.root}' is not a folder; name one of class folders")
    size = config.image_size or 32
    files, classes = find_images(root)

    def build(writer: CacheWriter) -> None:
        writer.classes = classes
        for split, entries in files.items():
            target = writer.create(split, [label for _, label, *_ in entries], size)
            failures = decode_files([path for path, *_ in entries], target, f"decoding {split}")
            if not failures:
                continue
            reasons = [f"{entries[row][0]}: {why}" for row, why in failures.items()]
            require(
                config.bad_images == "skip",
                f"{len(failures)} of the {split} images cannot be decoded, the first {reasons[0]}; "
                "mend or remove them, or leave them out with --data.bad_images skip",
            )
            _refuse_emptied_class(split, entries, set(failures), classes)
            writer.drop(split, list(failures))
            writer.skipped += reasons

    key = f"imagefolder-{_fingerprint(root, files, config, size)}"
    return load_or_build(cache_folder(config), key, build)


def find_images(root: Path) -> tuple[Files, tuple[str, ...]]:
    """List the image files of each part with their labels.

    Args:
        root: holds train and test (or val, valid, validation) with class folders in each, or
            class folders directly, which are then all "train".

    Returns:
        {"train" | "test" | "val": [(path, label, bytes, time of change), ...]} and the class names,
        sorted. With one of test and val only, it is called "test".
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
    files: Files = {}
    for split, folder in parts.items():
        files[split] = []
        for label, name in enumerate(names[split]):
            images = sorted(_scan(os.fspath(folder / name)))
            require(
                bool(images),
                f"class folder {folder / name} holds no image; add some "
                f"({', '.join(sorted(SUFFIXES))}) or remove the folder",
            )
            files[split] += [(path, label, size, changed) for path, size, changed in images]
    return files, tuple(names[first])


def list_images(folder: Path) -> list[Path]:
    """Return the image files in and below a folder, sorted."""
    return [Path(path) for path, _, _ in sorted(_scan(os.fspath(folder)))]


def _scan(folder: str) -> Iterator[tuple[str, int, int]]:
    """Find image files with their size and time of change; at each start, so as fast as it goes."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _scan(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                try:
                    stat = entry.stat()
                    yield entry.path, stat.st_size, stat.st_mtime_ns
                except OSError:  # a broken link: decoding will say so
                    yield entry.path, 0, 0


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _refuse_emptied_class(
    split: str, entries: list[tuple[str, int, int, int]], failed: set[int], classes: tuple[str, ...]
) -> None:
    left = {label for row, (_, label, *_) in enumerate(entries) if row not in failed}
    for label, name in enumerate(classes):
        require(label in left, f"no image of class '{name}' in {split} can be decoded")


def _fingerprint(root: Path, files: Files, config: DataConfig, size: int) -> str:
    """Identify the decoded pixels by every file's place, size and time of change."""
    digest = hashlib.sha256(f"{FORMAT} {size} {config.bad_images}".encode())
    outside = len(os.fspath(root))
    for split, entries in files.items():
        for path, label, length, changed in entries:
            line = f"{split} {label} {path[outside:]} {length} {changed}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
