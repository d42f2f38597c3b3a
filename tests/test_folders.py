"""Folders of images: files that are listed, left out and reported, or refused."""

import json
import os
import random
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.config import DataConfig
from cifar_dist.data import Dataset, imagefolder, load_dataset, load_evaluation
from cifar_dist.data.decode import decode_image
from cifar_dist.data.images import Images
from cifar_dist.data.listing import SUFFIXES, find_images, find_splits, list_images
from cifar_dist.errors import RunError, UsageError
from cifar_dist.train import main
from tests.folders import generate
from tests.forked import start
from tests.helpers import TINY, write_folder

FOLDER = ["--data.name", "imagefolder", "--train.epochs", "1", "--train.batch_size", "8"]


def folder_config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="imagefolder", root=str(root), **options)  # type: ignore[arg-type]


def load(root: Path, **options: object) -> Dataset:
    return load_dataset(folder_config(root, **options))


def left_out(root: Path, bad_images: str = "stop") -> dict[str, dict[str, int]]:
    """Return the numbers of files that are left out, by the start of the reason."""
    found = find_images(root, bad_images).left_out
    return {reason.split(" (")[0]: counts for reason, counts in found.items()}


def trained(capfd: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> tuple[str, dict]:
    """Train, and return stdout and the content of run.json."""
    out = tmp_path / "out"
    assert main([*TINY, *FOLDER, *options, "--out", str(out)]) == 0, capfd.readouterr()
    return capfd.readouterr().out, json.loads((out / "run.json").read_text())


# Cache keys


@pytest.mark.fault(41)
def test_folders_with_equal_names_sizes_and_times_have_their_own_cache_entries(
    tmp_path: Path,
) -> None:
    for name, colours in (("a", ("red", "blue")), ("b", ("blue", "red"))):
        for split in ("train", "test"):
            for label, colour in zip(("cat", "ship"), colours, strict=True):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                Image.new("RGB", (8, 8), colour).save(folder / "x.bmp")
                os.utime(folder / "x.bmp", (1577836800,) * 2)
    for name, first in (("a", [255, 0, 0]), ("b", [0, 0, 255])):
        assert load(tmp_path / name).train.images[0, 0, 0].tolist() == first


@pytest.mark.parametrize("how", ["in place", "by another file", "through a link"])
def test_a_file_replaced_with_the_same_size_and_time_is_decoded_again(
    how: str, tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    file = root / "train" / "disc" / "a.bmp"
    red, blue = tmp_path / "red.bmp", tmp_path / "blue.bmp"
    for path in (red, blue):
        Image.new("RGB", (32, 32), path.stem).save(path)
        os.utime(path, (1577836800,) * 2)
    if how == "through a link":
        file.symlink_to(red)
    else:
        shutil.copy2(red, file)
    assert load(root).train.images[4, 0, 0].tolist() == [255, 0, 0]
    if how == "in place":
        file.write_bytes(blue.read_bytes())
        os.utime(file, (1577836800,) * 2)
    elif how == "by another file":
        os.replace(shutil.copy2(blue, tmp_path / "copy"), file)
    else:
        os.replace(blue, red)
    assert load(root).train.images[4, 0, 0].tolist() == [0, 0, 255]


def test_a_link_to_another_file_of_the_same_size_and_times_is_decoded_again(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    red, blue = tmp_path / "red.bmp", tmp_path / "blue.bmp"
    for path in (red, blue):
        Image.new("RGB", (32, 32), path.stem).save(path)
    for _ in range(1000):  # until both have the same ctime, which advances in ticks
        os.utime(red, (1577836800,) * 2)
        os.utime(blue, (1577836800,) * 2)
        if red.stat().st_ctime_ns == blue.stat().st_ctime_ns:
            break
    file = root / "train" / "disc" / "a.bmp"
    file.symlink_to(red)
    assert load(root).train.images[4, 0, 0].tolist() == [255, 0, 0]
    file.unlink()
    file.symlink_to(blue)
    assert load(root).train.images[4, 0, 0].tolist() == [0, 0, 255]


def test_each_image_size_is_decoded_separately(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    assert [load(root, image_size=size).train.image_size for size in (32, 16, 8)] == [32, 16, 8]


@pytest.mark.fault(42)
def test_a_folder_that_changes_while_it_is_decoded_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    file = sorted((root / "train" / "disc").iterdir())[0]
    changes = [lambda: Image.new("RGB", (32, 32), "white").save(file)]
    decode_files = imagefolder.decode_files

    def decode_and_change(*arguments: object) -> dict[int, str]:
        failures = decode_files(*arguments)  # type: ignore[arg-type]
        if changes:
            changes.pop()()
        return failures

    monkeypatch.setattr(imagefolder, "decode_files", decode_and_change)
    assert load(root).train.images[0].min() == 255
    output = capfd.readouterr()
    assert output.out == f"{root} changed while it was decoded; decoding it again\n"
    assert not list(Path(os.environ["XDG_CACHE_HOME"]).glob("*/.imagefolder*"))
    changes[:] = [lambda: file.write_bytes(file.read_bytes()) and None] * 100
    os.utime(file)
    with pytest.raises(RunError, match="changes while it is decoded; start again when it is"):
        load(root)


# Splits


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("names", "measured"),
    [
        (("Train", "Test"), ["test"]),
        (("TRAIN", "VALID"), ["val"]),
        (("training", "testing"), ["test"]),
        (("train", "Test"), ["test"]),
        (("Training", "Testing", "Validation"), ["val", "test"]),
    ],
)
def test_splits_have_several_names_in_any_case(
    names: tuple[str, ...], measured: list[str], tmp_path: Path
) -> None:
    counts = {name: 12 - 3 * number for number, name in enumerate(names)}
    dataset = load(write_folder(tmp_path / "set", counts))
    assert dataset.classes == ("disc", "ring", "square")
    assert len(dataset.train) == 12
    assert list(dataset.evaluation) == measured
    assert len(dataset.evaluation[measured[-1]]) == 9


@pytest.mark.parametrize("names", [("train", "Training"), ("val", "valid"), ("Test", "testing")])
def test_two_folders_of_one_split_are_refused_by_name(
    names: tuple[str, str], tmp_path: Path
) -> None:
    root = write_folder(tmp_path / "set", {**dict.fromkeys(names, 6), "x": 6})
    first, second = sorted(names)
    with pytest.raises(UsageError, match=f"'{first}' and '{second}' in .* mean the same split"):
        load(root)
    shutil.rmtree(root / second)
    (root / second).symlink_to(first)  # the same folder twice
    assert [path.name for path in find_splits(root).values()] == [first]


def test_a_test_folder_without_a_train_folder_is_refused_by_name(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"Testing": 6})
    write_folder(root, {".": 6})  # class folders beside it
    with pytest.raises(UsageError, match="has no train folder beside its Testing folder; name"):
        load(root, val_fraction=0.5)
    assert len(load_evaluation(folder_config(root), None)[1]) == 6


def test_splits_within_a_split_are_refused_but_a_class_may_be_named_train(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train/Train": 6, "train/test": 6})
    with pytest.raises(UsageError, match=r"the folders Train, test in .*set/train are splits, not"):
        load(root, val_fraction=0.5)
    root = write_folder(tmp_path / "vehicles", {"train": 12, "test": 6})
    for split in ("train", "test"):
        (root / split / "disc").rename(root / split / "train")
    assert load(root).classes == ("ring", "square", "train")


# Files that count as images


def test_every_suffix_of_a_raster_format_that_pillow_reads_is_listed() -> None:
    Image.init()
    stubs = {"BUFR", "GRIB", "HDF5", "MPEG"}  # identified, but without a decoder
    programs = {"EPS", "WMF", "IPTC", "PDF"}
    readable = {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in {*Image.OPEN, "MPO"} - stubs - programs
    }
    assert readable == SUFFIXES


def test_other_suffixes_of_decoded_formats_are_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    image = Image.new("RGB", (32, 32), "white")
    others = {
        **{"a.jfif": "JPEG", "b.JPE": "JPEG", "c.jp2": "JPEG2000", "d.TGA": "TGA", "e.dib": "DIB"},
        **{"f.apng": "PNG", "g.pbm": "PPM", "h.pnm": "PPM", "i.qoi": "QOI", "j.mpo": "MPO"},
    }
    for name, kind in others.items():
        if kind in Image.SAVE:
            image.save(root / "train" / "disc" / name, format=kind)
    expected = sum(kind in Image.SAVE for kind in others.values())
    train = load(root).train
    assert np.bincount(train.labels).tolist() == [4 + expected, 4, 4]
    assert train.images[4 : 4 + expected].min() > 250


@pytest.mark.fault(47)
@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [(".png", ".heic", ".heic"), (".png", ".HEIF", ".heif"), (".png", "", "without suffix")],
)
def test_images_that_are_not_decoded_are_refused_or_counted(
    old: str, new: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    for file in sorted((root / "train" / "ring").iterdir())[:5]:
        file.rename(file.with_name(file.name.replace(old, new)))
    (root / "train" / "ring" / "LICENSE").write_text("no image")
    options = ["--data.root", str(root)]
    assert main([*TINY, *FOLDER, *options, "--out", str(tmp_path / "out")]) == 2
    message = capfd.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"error: 5 images are not decoded (5 {kind}), the first {root}/train")
    assert "convert HEIC" in message
    assert "--data.bad_images skip" in message
    output, facts = trained(capfd, tmp_path, *options, "--data.bad_images", "skip")
    assert facts["train_images"] == 31
    counts = [counts.get(kind, 0) for counts in facts["left_out_files"].values()]
    assert 5 in counts
    (line,) = [line for line in output.splitlines() if f": 5 {kind}" in line]
    assert line.startswith("warning: left out, images ")
    for file in (root / "train" / "ring").glob("*.png"):
        file.unlink()
    with pytest.raises(UsageError, match=rf"ring holds no image; left out, .*: 5 {kind}"):
        load(root, bad_images="skip")


def test_images_to_predict_include_those_that_are_not_decoded(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {".": 9})
    names = sorted(file.relative_to(root) for file in root.rglob("*.png"))
    assert list_images(root) == [root / name for name in names]
    (root / names[1]).rename(root / names[1].with_suffix(".heic"))
    (root / names[2]).rename(root / names[2].with_suffix(""))
    (root / "notes").write_text("no image")
    expected = [names[0], names[1].with_suffix(".heic"), names[2].with_suffix(""), *names[3:]]
    assert list_images(root) == [root / name for name in sorted(expected)]


def test_a_class_folder_may_be_a_link_and_others_are_not_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    (root / "train" / "disc").rename(tmp_path / "elsewhere")
    (root / "train" / "disc").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "ring" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "gone").symlink_to(tmp_path / "absent")
    (root / "train" / "circle").symlink_to("circle")
    train = load(root).train
    assert train.classes == ("disc", "ring", "square")
    assert np.bincount(train.labels).tolist() == [4, 4, 4]
    assert left_out(root) == {
        "in no class folder": {"without suffix": 2},
        "links to folders, or to nothing": {"without suffix": 1},
    }


@pytest.mark.fault(48)
def test_everything_left_out_is_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9, "extra": 3})
    disc = root / "train" / "disc"
    for place in (root, root / "train", disc):
        (place / "notes.TXT").write_text("not an image")
    (root / "train" / "loose.png").write_bytes(b"")
    (disc / "0001.jpg_large").write_text("")
    (disc / "LICENSE").write_text("")
    (disc / "linked").symlink_to(root / "extra")
    (disc / "nothing.txt").symlink_to(root / "absent")
    (root / ".git").mkdir()
    (disc / ".x.png").write_bytes(b"")
    output, facts = trained(capfd, tmp_path, "--data.root", str(root))
    assert facts["left_out_files"] == {
        "hidden or system files": {".git/": 1, ".png": 1},
        "in no class folder": {"extra/": 1, ".txt": 2, ".png": 1},
        "not named as images": {".txt": 1, ".jpg_large": 1, "without suffix": 1},
        "links to folders, or to nothing": {".txt": 1, "without suffix": 1},
    }
    assert [line for line in output.splitlines() if "left out," in line] == [
        "note: left out, hidden or system files: 1 .git/, 1 .png",
        "warning: left out, in no class folder: 2 .txt, 1 .png, 1 extra/",
        "warning: left out, not named as images: 1 .jpg_large, 1 .txt, 1 without suffix",
        "warning: left out, links to folders, or to nothing: 1 .txt, 1 without suffix",
    ]
    # A second start reads the images from the cache, but lists the folder again.
    (disc / "more.md").write_text("")
    again = folder_config(root)
    dataset = load_dataset(again)
    assert dataset.left_out["not named as images"][".md"] == 1


@pytest.mark.fault(49)
def test_hidden_and_system_files_are_never_images_or_classes(tmp_path: Path) -> None:
    flat = write_folder(tmp_path / "flat", {".": 12})
    for name in ("disc", "ring", "square"):
        copies = flat / name / ".ipynb_checkpoints"
        copies.mkdir()
        for file in (flat / name).glob("*.png"):
            shutil.copy2(file, copies / f"{file.stem}-checkpoint.png")
    (flat / "disc" / "._00001.png").write_bytes(b"\0\5\x16\7")
    (flat / "disc" / "Thumbs.db").write_bytes(b"")
    (flat / "disc" / "@eaDir" / "x.png").mkdir(parents=True)
    (flat / "disc" / "@eaDir" / "x.png" / "SYNOPHOTO_THUMB_M.jpg").write_bytes(b"")
    for beside in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "lost+found"):
        (flat / beside / "disc").mkdir(parents=True)
        (flat / beside / "disc" / "._x.png").write_bytes(b"")
    dataset = load(flat, val_fraction=0.25)
    assert dataset.classes == ("disc", "ring", "square")
    assert (len(dataset.train), len(dataset.evaluation["val"])) == (9, 3)
    assert dataset.evaluation["val"].identical_to(dataset.train) == 0
    assert left_out(flat) == {
        "hidden or system files": {
            **{"__MACOSX/": 1, "@eaDir/": 1, ".ipynb_checkpoints/": 1, "lost+found/": 1},
            **{".png": 13, ".db": 1, ".jpg": 1},
        }
    }
    assert len(list_images(flat / "disc")) == 4


@pytest.mark.fault(50)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "s", {"train": 12, "test": 6})
    os.mkfifo(root / "train" / "disc" / "fifo.jpg")  # opening it would block for ever
    os.mkfifo(root / "train" / "disc" / "fifo")
    (root / "train" / "disc" / "link.png").symlink_to("fifo.jpg")
    (root / "train" / "disc" / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "train" / "disc" / "socket.png"))
        assert len(load(root).train) == 12
    assert left_out(root) == {"not regular files": {".jpg": 1, ".png": 3, "without suffix": 1}}
    assert len(list_images(root / "train" / "disc")) == 4


@pytest.mark.fault(51)
@pytest.mark.parametrize("place", ["root", "train", "class", "unsearchable class"])
def test_a_folder_that_this_user_may_not_list_is_named(place: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    folder = {"root": root, "train": root / "train"}.get(place, root / "train" / "ring")
    folder.chmod(0o444 if place == "unsearchable class" else 0o300)
    options = [*TINY, *FOLDER, "--data.root", str(root), "--out", str(tmp_path / "out")]
    with start(options, folder=tmp_path / "job", fault="loses_privileges") as job:
        assert job.wait() == [2], job.text()
    folder.chmod(0o755)
    assert job.text() == (
        f"error: the folder {folder} cannot be listed (Permission denied); make it readable for "
        "this user (read and search permission), or remove it\n"
    )


# Warnings


@pytest.mark.fault(52)
def test_identical_images_in_training_and_evaluation_splits_are_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 9})
    first, second = sorted((root / "train" / "disc").iterdir())[:2]
    shutil.copy(first, root / "test" / "ring" / "copy.png")
    image = Image.open(second)
    image.save(root / "test" / "disc" / "same pixels.bmp")
    image.paste("white", (31, 31, 32, 32))
    image.save(root / "test" / "disc" / "one pixel differs.bmp")
    output, facts = trained(capfd, tmp_path, "--data.root", str(root))
    assert facts["identical_images"] == {"test": 2}
    assert "warning: 2 of 12 test images are identical to training images" in output
    dataset = load(root, limit_train=3)  # images beyond the limit do not count
    chosen = {first, second} & {
        sorted((root / "train").rglob("*.png"))[row] for row in dataset.train.selected
    }
    assert dataset.evaluation["test"].identical_to(dataset.train) == len(chosen)


def test_identical_images_are_counted_in_a_held_out_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {".": 30})
    for name in ("disc", "ring", "square"):
        for file in list((root / name).iterdir()):
            shutil.copy(file, file.with_name(f"copy of {file.name}"))
    dataset = load(root, val_fraction=0.2)
    trained_on = {dataset.train.images[row].tobytes() for row in dataset.train.selected}
    held_out = dataset.evaluation["val"]
    expected = sum(held_out.images[row].tobytes() in trained_on for row in held_out.selected)
    assert 0 < expected == held_out.identical_to(dataset.train)


@pytest.mark.fault(53)
def test_a_class_with_one_image_is_trained_on_and_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {".": 45})
    for file in sorted((root / "ring").iterdir())[1:]:
        file.unlink()
    output, _ = trained(capfd, tmp_path, "--data.root", str(root), "--data.val_fraction", "0.1")
    assert "31 training images" not in output
    assert "\nwarning: val has no image of ring\n" in output
    dataset = load(root, val_fraction=0.1)
    assert np.bincount(dataset.train.labels[dataset.train.selected]).tolist() == [13, 1, 13]
    for name in ("disc", "square"):
        for file in sorted((root / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(UsageError, match=r"cannot hold out any image: no class .* more than one"):
        load(root, val_fraction=0.1)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_held_out_split_leaves_each_class_an_image(fraction: float) -> None:
    labels = np.repeat(np.arange(5), [1, 2, 3, 10, 100])
    images = Images(np.zeros((116, 1, 1, 3), np.uint8), labels, tuple("abcde"))
    train, held_out = images.split(fraction, seed=0)
    assert train.absent_classes() == []
    assert held_out.absent_classes() == ["a"]
    assert sorted([*train.selected, *held_out.selected]) == list(range(116))


def test_a_class_lost_to_a_limit_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "set", {"train": 120, "test": 30})
    for file in sorted((root / "train" / "ring").iterdir())[1:]:
        file.unlink()
    options = ["--data.root", str(root), "--data.limit_train", "32", "--data.seed", "1"]
    output, _ = trained(capfd, tmp_path, *options)
    assert "\nwarning: train has no image of ring\n" in output


def test_the_banner_names_the_classes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "set", {"train": 36, "test": 36}, classes=3)
    for split in ("train", "test"):
        for number in range(9):
            shutil.copytree(root / split / "disc", root / split / f"new\nline {number}")
    output, _ = trained(capfd, tmp_path, "--data.root", str(root))
    shown = ", ".join(["disc", *(f"'new\\nline {number}'" for number in range(9))])
    assert f"\n  classes {shown} and 2 more\n" in output


# Generated folders


def check_generated(root: Path, seed: int) -> None:
    """Compare the listing and the pixels of a generated folder with its Truth."""
    truth = generate(root, random.Random(seed))
    listing = find_images(root, "skip")
    assert list(listing.classes) == sorted(truth.classes)
    for split, by_class in listing.files.items():
        found = {
            name: sorted(os.path.join(root, path) for path in paths)
            for name, paths in zip(listing.classes, by_class, strict=True)
        }
        assert found == {name: sorted(truth.images[split, name]) for name in truth.classes}
    assert {split for split, _ in truth.images} == set(listing.files)
    counted = {
        (reason.split(" (")[0], kind): count
        for reason, counts in listing.left_out.items()
        for kind, count in counts.items()
    }
    assert counted == truth.left_out
    # Each file that `find` counts is listed, left out, or below a folder that counts as one.
    everything = subprocess.run(
        ["find", os.fspath(root), "!", "-type", "d", "-printf", "x"],
        capture_output=True,
        check=True,
    ).stdout
    named = sum(count for (_, kind), count in counted.items() if kind.endswith("/"))
    listed = sum(map(len, truth.images.values()))
    assert len(everything) == listed + sum(counted.values()) - named + truth.below_named
    refused = any(reason.startswith("images") for reason, _ in counted)
    if refused:
        with pytest.raises(UsageError, match="images are not decoded"):
            find_images(root, "stop")
    else:
        assert find_images(root, "stop") == listing
    # Decoding: each class has the pixels of its own files.
    config = folder_config(root, image_size=8, bad_images="skip", val_fraction=truth.val_fraction)
    dataset = load_dataset(config)
    assert dataset.skipped == ()
    pixels = Counter[tuple[str, bytes]]()
    for images in (dataset.train, *dataset.evaluation.values()):
        for row in images.selected:
            pixels[images.classes[images.labels[row]], images.images[row].tobytes()] += 1
    assert pixels == Counter(
        (name, decode_image(path, 8).tobytes())
        for (_, name), paths in truth.images.items()
        for path in paths
    )
    trained_on = {dataset.train.images[row].tobytes() for row in dataset.train.selected}
    for images in dataset.evaluation.values():
        known = sum(images.images[row].tobytes() in trained_on for row in images.selected)
        assert images.identical_to(dataset.train) == known
    assert dataset.train.absent_classes() == []


@pytest.mark.fault(54)
@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 2060), marks=pytest.mark.slow)], ids=len
)
def test_generated_folders_are_listed_as_they_were_made(seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        root = tmp_path / "set"
        try:
            check_generated(root, seed)
        except BaseException:
            print(f"seed {seed}")
            raise
        shutil.rmtree(root)
        shutil.rmtree(Path(os.environ["XDG_CACHE_HOME"], "cifar-dist"))
