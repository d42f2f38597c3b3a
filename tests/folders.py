"""Generate folders of images as users have them, from a seed, with the expected listing."""

import io
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

STEMS = [
    *("image", "IMG 1", "größe", "日本", "-rf", "#1", "100%", "v1.2", 'it\'s "quoted"', "x" * 180),
    *(("new\nline", "tab\t", os.fsdecode(b"caf\xe9")) if sys.platform == "linux" else ()),
]
CLASSES = [*STEMS, "cat", "Dog", "two words", "a.jpg", "0", "validation set"]
SPLITS = {
    "train": ("train", "Train", "TRAIN", "training", "Training"),
    "test": ("test", "Test", "testing", "TESTING"),
    "val": ("val", "Val", "valid", "validation", "Validation"),
}
FORMATS = {
    **{"PNG": (".png", ".apng"), "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"), "BMP": (".bmp",)},
    **{"GIF": (".gif",), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",), "PPM": (".ppm", ".pnm")},
    **{"TGA": (".tga",), "JPEG2000": (".jp2", ".j2k"), "DIB": (".dib",), "PCX": (".pcx",)},
}
MODES = {"PNG": ("RGB", "L", "P", "RGBA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
HIDDEN_FOLDERS = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", ".Trash-1000")


@dataclass
class Truth:
    """The expected listing of a generated folder.

    Attributes:
        images: paths by (split, class).
        left_out: number of files by (start of the reason, suffix).
        below_named: number of files below folders that count as one.
        val_fraction: option to load the folder with.
    """

    classes: list[str]
    images: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    below_named: int = 0
    val_fraction: float = 0.0


def generate(root: Path, source: random.Random) -> Truth:
    """Write a folder that can be trained on, with other files that users may have in it."""
    classes = source.sample(CLASSES, source.randint(2, 4))
    splits = source.choice([["train"], ["train", "test"], ["train", "val"], list(SPLITS)])
    truth = Truth(classes)
    if splits == ["train"]:
        truth.val_fraction = 0.3
        folders = {"train": root}
    else:
        folders = {split: root / source.choice(SPLITS[split]) for split in splits}
        if "test" not in folders:
            folders["test"] = folders.pop("val")
        if source.random() < 0.3:
            classes[0] = "train"  # within a split a class may have that name
    root.mkdir()
    writer = _Writer(source, truth)
    for split, folder in folders.items():
        folder.mkdir(exist_ok=True)
        for name in classes:
            (folder / name).mkdir()
            writer.images = truth.images[split, name] = []
            writer.write_image(folder / name)
            writer.fill(folder / name, source.randint(2, 12), depth=0)
    for folder in {*folders.values(), root}:
        writer.litter(folder, splits=folder == root and folder not in folders.values())
    return truth


class _Writer:
    """Writes files, and records in a `Truth` how each must be listed.

    Attributes:
        images: list for the paths of the current class.
    """

    def __init__(self, source: random.Random, truth: Truth) -> None:
        self.source, self.truth = source, truth
        self.images: list[str] = []
        self.written: list[bytes] = []
        self.number = 0

    def fill(self, folder: Path, count: int, depth: int) -> None:
        """Write files of all kinds into and below a class folder."""
        kinds = [self.write_image] * 6
        kinds += [
            self.link_image,
            self.hide,
            self.write_other,
            self.write_undecoded,
            self.write_odd,
        ]
        for _ in range(count):
            if depth < 3 and self.source.random() < 0.1:
                below = folder / self.name(self.source.choice(["", ".png", ".d"]))
                below.mkdir()
                self.fill(below, self.source.randint(0, 4), depth + 1)
            else:
                self.source.choice(kinds)(folder)

    def name(self, suffix: str) -> str:
        """Return a unique file name, even on a file system that ignores case."""
        self.number += 1
        case = self.source.choice([str.lower, str.lower, str.upper, str.title])
        return f"{self.source.choice(STEMS)}{self.number}{case(suffix)}"

    def pixels(self) -> tuple[bytes, str]:
        """Return the content of an image file, sometimes of an earlier one, and a suffix for it."""
        kind = self.source.choice(list(FORMATS))
        suffix = self.source.choice(FORMATS[kind])
        if self.written and self.source.random() < 0.15:
            return self.source.choice(self.written), suffix  # a duplicate, under any suffix
        size = self.source.choice([(8, 8), (9, 8), (4, 12)])
        image = Image.frombytes("RGB", size, self.source.randbytes(3 * size[0] * size[1]))
        options = {}
        if kind in ("PNG", "JPEG", "WEBP", "TIFF") and self.source.random() < 0.3:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = self.source.randint(1, 8)
        mode = self.source.choice(MODES.get(kind, ("RGB",)))
        content = io.BytesIO()
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(content, kind, **options)
        self.written.append(content.getvalue())
        return self.written[-1], suffix

    def write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        path.chmod(self.source.choice([0o644, 0o600, 0o444, 0o755]))

    def leave_out(self, reason: str, kind: str) -> None:
        self.truth.left_out[reason, kind] += 1

    def write_image(self, folder: Path) -> None:
        content, suffix = self.pixels()
        path = folder / self.name(suffix)
        self.write(path, content)
        self.images.append(os.fspath(path))

    def link_image(self, folder: Path) -> None:
        path = folder / self.name(".png")
        target = self.source.choice(self.images)
        path.symlink_to(target if self.source.random() < 0.5 else os.path.relpath(target, folder))
        self.images.append(os.fspath(path))

    def hide(self, folder: Path) -> None:
        """Write a hidden or system file, or such a folder with files."""
        content, suffix = self.pixels()
        kind = self.source.randrange(3)
        if kind == 0:
            self.write(folder / f"{self.source.choice(['.', '._'])}{self.name(suffix)}", content)
        elif kind == 1:
            name, suffix = self.source.choice([("Thumbs.db", ".db"), ("desktop.ini", ".ini")])
            if (folder / name).exists():
                return
            self.write(folder / name, b"")
        else:
            below = folder / self.source.choice(HIDDEN_FOLDERS) / self.name("")
            below.mkdir(parents=True)
            self.write(below / self.name(suffix), content)
            (below / self.name(".png")).symlink_to("absent")
            self.leave_out("hidden or system files", ".png")
        self.leave_out("hidden or system files", suffix)

    def write_other(self, folder: Path) -> None:
        suffix = self.source.choice([".txt", ".json", ".svg", ".jpg_large", ".0001", "", ".a b"])
        self.write(folder / self.name(suffix), b"BMW, GIF and other notes")
        odd = suffix in (".0001", "", ".a b")
        self.leave_out("not named as images", "without suffix" if odd else suffix)

    def write_undecoded(self, folder: Path) -> None:
        if self.source.random() < 0.7:  # most folders have none, and are not refused
            return
        if self.source.random() < 0.5:
            suffix = self.source.choice([".heic", ".heif", ".jxl"])
            self.write(folder / self.name(suffix), bytes(64))
            self.leave_out("images of a format that is not decoded", suffix)
        else:
            content = io.BytesIO()
            kind = self.source.choice(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
            Image.new("RGB", (8, 8)).save(content, kind)
            path = folder / self.name(self.source.choice(["", ".0001", ".~1~", ".jpg~"]))
            self.write(path, content.getvalue())
            self.leave_out("images without a suffix", "without suffix")

    def write_odd(self, folder: Path) -> None:
        """Write a link that is not followed, or a FIFO."""
        kind = self.source.randrange(3)
        suffix = self.source.choice([".txt", ".png"])
        path = folder / self.name(suffix)
        if kind == 0:
            path.symlink_to(self.source.choice([folder, folder.parent, "."]))
        elif kind == 1:
            suffix, path = ".txt", path.with_suffix(".txt")
            path.symlink_to(self.source.choice(["absent", path.name]))
        else:
            os.mkfifo(path)
        self.leave_out(
            "not regular files" if kind == 2 else "links to folders, or to nothing", suffix
        )

    def litter(self, folder: Path, splits: bool) -> None:
        """Write files and folders beside class folders, or beside the folders of splits."""
        for _ in range(self.source.randint(0, 3)):
            content, suffix = self.pixels()
            self.write(folder / self.name(suffix), content)
            self.leave_out("in no class folder", suffix)
        for name in self.source.sample([*HIDDEN_FOLDERS, "extra"], self.source.randint(0, 2)):
            if name == "extra" and not splits:
                continue  # it would be a class
            (folder / name / "cat").mkdir(parents=True)
            self.write(folder / name / "cat" / "x.png", b"")
            self.truth.below_named += 1
            hidden = name != "extra"
            self.leave_out("hidden or system files" if hidden else "in no class folder", f"{name}/")
