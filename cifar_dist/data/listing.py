"""List the image files of a folder, and derive the cache key of their decoded pixels."""

import hashlib
import os
import re
import stat
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cifar_dist.errors import UsageError, require

# Suffixes that Pillow registers for the raster formats that it decodes itself. The suffix decides
# only whether a file counts as an image; its content selects the decoder.
SUFFIXES = {
    *(".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds", ".dib", ".fit"),
    *(".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".gif", ".icb", ".icns", ".ico", ".im"),
    *(".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo"),
    *(".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".psd", ".pxr"),
    *(".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga", ".tif", ".tiff", ".vda", ".vst", ".webp"),
    *(".xbm", ".xpm"),
}
NOT_DECODED = {".heic", ".heif", ".hif", ".jxl"}  # images, but Pillow alone cannot read them
SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
# Folders and files that operating systems, file servers and recycle bins leave among images.
SYSTEM = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
USUAL_SUFFIX = re.compile(r"\.[a-z][a-z0-9_]{0,9}")
NO_SUFFIX = "without suffix"
FORMAT = "2"  # change it whenever decode_image returns other pixels for the same file
UNSIGNED = (1 << 64) - 1

# Reasons for leaving files out; keys of "left_out" in run.json.
HIDDEN = "hidden or system files"
OUTSIDE = "in no class folder"
OTHER = "not named as images"
UNDECODED = "images of a format that is not decoded (convert them to JPEG or PNG)"
BARE = "images without a suffix (add that of their format, such as .jpg)"
LINK = "links to folders, or to nothing"
SPECIAL = "not regular files"

LeftOut = dict[str, dict[str, int]]


class Listing(NamedTuple):
    """The image files of a folder, in a fixed order.

    Attributes:
        root: the folder, with symbolic links resolved.
        files: for each split ("train", "test", "val") one list per class of paths below the folder.
        classes: names, sorted.
        stamps: size in bytes, mtime and ctime in nanoseconds, and inode of every file in turn,
            modulo 2^64. An array, because tuples would slow down the garbage collector.
        left_out: number of all other files, by reason and suffix.
    """

    root: str
    files: dict[str, list[list[str]]]
    classes: tuple[str, ...]
    stamps: array
    left_out: LeftOut

    def key(self, image_size: int, bad_images: str) -> str:
        """Return the cache key of the decoded pixels.

        Inode and ctime, which no program can set, distinguish files that have the same name, size
        and mtime.
        """
        what = repr((FORMAT, self.root, image_size, bad_images, self.files))
        digest = hashlib.blake2b(what.encode(), digest_size=16)
        digest.update(self.stamps)
        return f"imagefolder-{digest.hexdigest()}"


def find_images(root: Path, bad_images: str) -> Listing:
    """List the image files of each split by class.

    If only one of test and val exists, it is called "test".

    Hidden and system files, links to folders, and whatever is not a regular file are never images.

    Args:
        root: holds train and test (or val, valid, validation) with class folders in each, or
            class folders directly, which are then all "train". See `find_splits`.
        bad_images: "stop" refuses images that have no suffix or a format that is not decoded,
            "skip" leaves them out.

    Raises:
        UsageError: a folder is missing or unreadable; two folders name the same split; a class is
            empty, or missing in one split; or an image is refused.
    """
    parts, walk = find_splits(root), _Walk()
    if parts:
        splits = {folder.name for folder in parts.values()}
        walk.enter(root, lambda entry: entry.name in splits)
    else:
        parts = {"train": root}
    names = {split: walk.enter(folder, _is_folder) for split, folder in parts.items()}
    first = next(iter(names))
    for split, found in names.items():
        missing, extra = set(names[first]) - set(found), set(found) - set(names[first])
        require(
            not missing and not extra,
            f"the classes of {shown(parts[first])} and {shown(parts[split])} differ: "
            + "; ".join(
                f"{what} in {split}: {', '.join(map(shown, sorted(which)))}"
                for what, which in (("missing", missing), ("only", extra))
                if which
            ),
        )
    require(
        len(names[first]) >= 2,
        f"{shown(parts[first])} holds {len(names[first])} class folders; at least 2 are needed"
        + ("" if parts[first] == root else f" ('{parts[first].name}' is a split, not a class)"),
    )
    require(
        not all(name.lower() in SPLITS for name in names[first]),
        f"the folders {', '.join(names[first])} in {shown(parts[first])} are splits, not classes; "
        f"if they hold class folders, use --data.root {shown(parts[first])}",
    )
    files = {
        split: [
            walk.images(os.fspath(folder / name), f"{(folder / name).relative_to(root)}/")
            for name in names[split]
        ]
        for split, folder in parts.items()
    }
    if walk.undecoded and bad_images == "stop":
        kinds = {**walk.left_out.get(UNDECODED, {}), **walk.left_out.get(BARE, {})}
        raise UsageError(
            f"{len(walk.undecoded)} images are not decoded ({_in_words(kinds)}), the first "
            f"{shown(walk.undecoded[0])}; convert HEIC, HEIF and JPEG XL to JPEG or PNG, add "
            "missing suffixes such as .jpg, or leave these out with --data.bad_images skip"
        )
    for split, by_class in files.items():
        for name, images in zip(names[split], by_class, strict=True):
            if not images:
                raise UsageError(_without_images(parts[split] / name))
    return Listing(os.path.realpath(root), files, tuple(names[first]), walk.stamps, walk.left_out)


def find_splits(root: Path) -> dict[str, Path]:
    """Return the existing folders of "train", "test" and "val", in upper or lower case.

    Raises:
        UsageError: `root` is not a readable folder, or two folders name the same split.
    """
    found: dict[str, Path] = {}
    for entry in _entries(root):
        split = SPLITS.get(entry.name.lower())
        if split is None or not _is_folder(entry):
            continue
        other = found.setdefault(split, Path(entry.path))
        require(
            other.name == entry.name or other.samefile(entry.path),
            f"'{other.name}' and '{entry.name}' in {shown(root)} mean the same split, {split}; "
            "merge them, or rename or remove one",
        )
    if "val" in found and "test" not in found:
        found["test"] = found.pop("val")
    return {split: found[split] for split in ("train", "test", "val") if split in found}


def labels_of(found: list[list[str]]) -> list[int]:
    """Return the label of each file of a split."""
    return [label for label, images in enumerate(found) for _ in images]


def list_images(folder: Path) -> list[Path]:
    """Return the image files in and below a folder, sorted, including formats not decoded.

    Raises:
        UsageError: a folder is unreadable.
    """
    walk = _Walk()
    found = [folder / path for path in walk.images(os.fspath(folder), "")]
    return sorted([*found, *map(Path, walk.undecoded)])


def shown(path: str | Path) -> str:
    """Return a path for a one-line message: escaped if it has newlines or is not UTF-8."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


def describe(left_out: LeftOut) -> list[str]:
    """Return one line per reason: "not regular files: 2 .jpg, 1 without suffix"."""
    return [f"{reason}: {_in_words(counts)}" for reason, counts in left_out.items()]


def _in_words(counts: Mapping[str, int], most: int = 10) -> str:
    """Return counts by suffix, the largest first: "5 .heic, 2 without suffix"."""
    order = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
    parts = [f"{counts[suffix]} {shown(suffix)}" for suffix in order[:most]]
    rest = sum(counts[suffix] for suffix in order[most:])
    return ", ".join([*parts, *([f"{rest} others"] if rest else [])])


def _without_images(folder: Path) -> str:
    walk = _Walk()
    walk.images(os.fspath(folder), "")
    return "; ".join(
        [
            f"class folder {shown(folder)} holds no image",
            *(f"left out, {line}" for line in describe(walk.left_out)),
            "add some (.jpg, .png or another format that Pillow reads) or remove the folder",
        ]
    )


class _Walk:
    """Walks through folders of images, and counts the files that it leaves out.

    Attributes:
        stamps, left_out: see `Listing`.
        undecoded: paths of the images that need another format or a suffix.
    """

    def __init__(self) -> None:
        self.stamps = array("Q")
        self.left_out: LeftOut = {}
        self.undecoded: list[str] = []

    def enter(self, folder: Path, belongs: Callable[["os.DirEntry[str]"], bool]) -> list[str]:
        """Return the sorted names of the entries that `belongs` accepts; leave out all others.

        A folder that is left out counts as one file, whatever it contains.
        """
        names = []
        for entry in _entries(folder):
            name = entry.name
            if not _is_hidden(name) and belongs(entry):
                names.append(name)
            else:
                kind = f"{name}/" if _is_folder(entry) else _suffix(name)
                self._leave_out(HIDDEN if _is_hidden(name) else OUTSIDE, kind)
        return names

    def images(self, folder: str, prefix: str) -> list[str]:
        """Return the image files in and below a folder, sorted. Fast: every start calls it.

        Raises:
            UsageError: a folder is unreadable.
        """
        try:
            with os.scandir(folder) as entries:
                return self._images(sorted(entries, key=lambda entry: entry.name), prefix)
        except (OSError, RecursionError) as error:
            raise _unreadable(folder, error) from error

    def _images(self, entries: list["os.DirEntry[str]"], prefix: str) -> list[str]:
        found: list[str] = []
        for entry in entries:
            name = entry.name
            if _is_hidden(name):
                self._leave_out_all(entry.path, HIDDEN)
                continue
            is_image = name[name.rfind(".") :].lower() in SUFFIXES
            try:
                status = entry.stat()
            except OSError:
                try:  # raises PermissionError if the folder may not be searched
                    os.lstat(entry.path)
                except FileNotFoundError:  # it has been removed
                    continue
                if is_image:  # a dangling link: decoding reports it
                    found.append(prefix + name)
                    self.stamps.extend((0, 0, 0, 0))
                else:
                    self._leave_out(LINK, _suffix(name))
                continue
            if stat.S_ISDIR(status.st_mode):
                if entry.is_symlink():
                    self._leave_out(LINK, _suffix(name))
                else:
                    found += self.images(entry.path, f"{prefix}{name}/")
            elif not stat.S_ISREG(status.st_mode):
                self._leave_out(SPECIAL, _suffix(name))
            elif is_image:
                found.append(prefix + name)
                self.stamps.append(status.st_size)
                self.stamps.append(status.st_mtime_ns & UNSIGNED)
                self.stamps.append(status.st_ctime_ns & UNSIGNED)
                self.stamps.append(status.st_ino & UNSIGNED)
            else:
                self._leave_out_other(entry.path)
        return found

    def _leave_out(self, reason: str, suffix: str) -> None:
        counts = self.left_out.setdefault(reason, {})
        counts[suffix] = counts.get(suffix, 0) + 1

    def _leave_out_other(self, path: str) -> None:
        """Leave out a regular file whose suffix is not in SUFFIXES."""
        suffix, reason = _suffix(path), OTHER
        if suffix in NOT_DECODED:
            reason = UNDECODED
        elif suffix == NO_SUFFIX and _is_image(path):
            reason = BARE
        if reason != OTHER:
            self.undecoded.append(path)
        self._leave_out(reason, suffix)

    def _leave_out_all(self, path: str, reason: str) -> None:
        """Leave out a file, or all files in and below a folder."""
        if not os.path.isdir(path) or os.path.islink(path):
            self._leave_out(reason, _suffix(path))
            return
        try:
            names = os.listdir(path)
        except OSError:
            self._leave_out(reason, "unreadable folder")
            return
        for name in names:
            self._leave_out_all(os.path.join(path, name), reason)


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"data.root '{shown(folder)}' is not a folder; name one of class folders"
        ) from error
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: str | Path, error: Exception) -> UsageError:
    return UsageError(
        f"the folder {shown(folder)} cannot be listed ({getattr(error, 'strerror', error)}); make "
        "it readable for this user (read and search permission), or remove it"
    )


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that forms a loop, or a target that this user may not access
        return False


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name.lower() in SYSTEM


def _suffix(name: str) -> str:
    """Return the suffix of a file in lower case, or NO_SUFFIX if it has none or an odd one."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if USUAL_SUFFIX.fullmatch(suffix) else NO_SUFFIX


def _is_image(path: str) -> bool:
    """Return True if a file begins like one of the usual image formats."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(12)
    except OSError:
        return False
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*"))
        or (head[:4] == b"RIFF" and head[8:] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[4:8] == b"ftyp" and head[8:] in (b"avif", b"heic", b"heix", b"mif1"))
    )
