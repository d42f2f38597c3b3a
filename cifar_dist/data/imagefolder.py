"""A folder of class folders: found, checked and decoded once, on all cores.

Every image ends as RGB of image_size x image_size pixels, in this order: turned as its EXIF tag
says; transparent parts laid on white; grey, palette, CMYK and 16-bit pixels converted to 8-bit RGB;
the largest centred square cut out and scaled (bicubic). Of an animation the first frame is used.
"""

import hashlib
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cifar_dist.config import DataConfig, cache_folder, require
from cifar_dist.data.cache import CacheWriter, load_or_build
from cifar_dist.data.images import Source
from cifar_dist.preemption import uninterrupted
from cifar_dist.runtime import usable_cores

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VALIDATION = ("val", "valid", "validation")
FORMAT = "1"  # change it whenever decode_image gives other pixels for the same file

# Pillow only warns between its limit and twice that; an image that large is refused outright.
warnings.simplefilter("error", Image.DecompressionBombWarning)

Files = dict[str, list[tuple[Path, int]]]


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
            array = writer.create(split, [label for _, label in entries], size)
            failures = _decode_all(entries, array, size, split)
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
        {"train" | "test" | "val": [(path, label), ...]} and the class names, sorted. With one of
        test and val only, it is called "test".
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
            paths = list_images(folder / name)
            require(
                bool(paths),
                f"class folder {folder / name} holds no image; add some "
                f"({', '.join(sorted(SUFFIXES))}) or remove the folder",
            )
            files[split] += [(path, label) for path in paths]
    return files, tuple(names[first])


def list_images(folder: Path) -> list[Path]:
    """Return the image files in and below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def decode_image(path: Path, size: int) -> np.ndarray:
    """Return one image file as uint8 [size, size, 3], converted as this module's docstring says.

    Raises:
        ValueError: the file is no image that can be decoded; the message says why.
    """
    try:
        with Image.open(path) as file:
            file.draft(None, (2 * size, 2 * size))  # JPEG: decode a large one at reduced scale
            image = _to_rgb(ImageOps.exif_transpose(file))
        fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return np.asarray(fitted)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip, not scale
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("pixels are floating-point numbers without a known range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _decode_all(
    entries: list[tuple[Path, int]], array: np.ndarray, size: int, split: str
) -> dict[int, str]:
    """Fill `array` row by row and return the rows that failed, each with the reason.

    In threads: Pillow releases the interpreter lock while it decodes and scales.
    """
    from tqdm import tqdm

    reasons: dict[int, str] = {}
    finished: list[int] = []

    def decode(row: int) -> None:
        try:
            array[row] = decode_image(entries[row][0], size)
        except ValueError as error:
            reasons[row] = str(error)
        finally:
            finished.append(row)

    with uninterrupted():
        pool = ThreadPoolExecutor(usable_cores())
        futures = [pool.submit(decode, row) for row in range(len(entries))]
        bar = tqdm(
            desc=f"decoding {split}",
            total=len(entries),
            unit=" images",
            disable=not sys.stderr.isatty(),
        )
    try:
        while len(finished) < len(entries):  # without a lock: a signal may end it anywhere
            time.sleep(0.02)
            bar.update(len(finished) - bar.n)
    finally:  # a signal does not wait for the images that are left
        pool.shutdown(cancel_futures=True)
        bar.close()
    for future in futures:
        future.result()  # an error that is not of the image
    return dict(sorted(reasons.items()))


def _refuse_emptied_class(
    split: str, entries: list[tuple[Path, int]], failed: set[int], classes: tuple[str, ...]
) -> None:
    left = {label for row, (_, label) in enumerate(entries) if row not in failed}
    for label, name in enumerate(classes):
        require(label in left, f"no image of class '{name}' in {split} can be decoded")


def _fingerprint(root: Path, files: Files, config: DataConfig, size: int) -> str:
    """Identify the decoded pixels by every file's place, size and time of change."""
    digest = hashlib.sha256(f"{FORMAT} {size} {config.bad_images}".encode())
    for split, entries in files.items():
        for path, label in entries:
            stat = path.stat()
            line = f"{split} {label} {path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
