"""Image folders: layouts, conversion of pixels, the cache, and errors."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.config import DataConfig
from cifar_dist.data import load_dataset, load_evaluation
from cifar_dist.data.cache import channel_statistics, count_levels, load_or_build
from cifar_dist.data.decode import decode_image
from cifar_dist.data.images import Images
from cifar_dist.data.synthetic import SHAPES, draw
from cifar_dist.errors import UsageError
from tests.helpers import write_folder


def folder_config(root: Path, **options: object) -> DataConfig:
    return DataConfig(name="imagefolder", root=str(root), **options)  # type: ignore[arg-type]


def test_the_images_labels_and_statistics_of_a_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 30, "test": 9})
    dataset = load_dataset(folder_config(root))
    assert dataset.classes == tuple(sorted(list(SHAPES)[:3]))
    assert len(dataset.train) == 30
    assert len(dataset.evaluation["test"]) == 9
    files = sorted((root / "train").rglob("*.png"))
    for row, file in enumerate(files):
        assert np.array_equal(dataset.train.images[row], np.asarray(Image.open(file)))
        assert dataset.classes[dataset.train.labels[row]] == file.parent.name
    pixels = dataset.train.images / 255.0
    assert dataset.mean == pytest.approx(tuple(pixels.mean(axis=(0, 1, 2))))
    assert dataset.std == pytest.approx(tuple(pixels.std(axis=(0, 1, 2))))


@pytest.mark.parametrize(
    ("name", "split"),
    [("test", "test"), ("val", "val"), ("valid", "val"), ("validation", "val")],
)
def test_each_name_of_the_folder_to_evaluate_on(name: str, split: str, tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 12, name: 6})
    evaluation = load_dataset(folder_config(root)).evaluation
    assert {name: len(images) for name, images in evaluation.items()} == {split: 6}
    assert load_evaluation(folder_config(root), None)[0] == split


def test_test_and_validation_folders_together(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 12, "test": 6, "val": 9})
    evaluation = load_dataset(folder_config(root)).evaluation
    assert {name: len(images) for name, images in evaluation.items()} == {"val": 9, "test": 6}
    with pytest.raises(UsageError, match="has a validation folder"):
        load_dataset(folder_config(root, val_fraction=0.5))


def test_a_folder_without_a_test_split_needs_val_fraction(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {".": 30})
    with pytest.raises(UsageError, match=r"--data\.val_fraction 0\.1"):
        load_dataset(folder_config(root))
    dataset = load_dataset(folder_config(root, val_fraction=0.2))
    held_out = dataset.evaluation["val"]
    assert np.bincount(held_out.labels[held_out.selected]).tolist() == [2, 2, 2]
    assert sorted([*dataset.train.selected, *held_out.selected]) == list(range(30))
    again = load_dataset(folder_config(root, val_fraction=0.2)).evaluation["val"]
    other = load_dataset(folder_config(root, val_fraction=0.2, seed=1)).evaluation["val"]
    assert again.selected.tolist() == held_out.selected.tolist() != other.selected.tolist()
    name, everything = load_evaluation(folder_config(root), split=None)
    assert (name, len(everything)) == ("train", 30)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("fraction", "counts"), [(0.1, [1, 2, 6]), (0.25, [2, 5, 15])])
def test_val_fraction_is_held_out_of_every_class(
    fraction: float, counts: list[int], seed: int
) -> None:
    labels = np.repeat([0, 1, 2], [8, 20, 60])
    whole = Images(np.zeros((88, 1, 1, 3), np.uint8), labels, ("a", "b", "c"))
    stays, held_out = whole.split(fraction, seed)
    assert np.bincount(labels[held_out.selected]).tolist() == counts
    assert sorted([*stays.selected, *held_out.selected]) == list(range(88))


def test_limits_choose_across_classes(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 60, "test": 30})
    dataset = load_dataset(folder_config(root, limit_train=30, limit_test=12))
    assert len(dataset.train) == 30
    assert len(dataset.evaluation["test"]) == 12
    assert set(dataset.train.labels[dataset.train.selected]) == {0, 1, 2}
    assert load_dataset(folder_config(root)).digest == dataset.digest


def save(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> np.ndarray:
    image.save(tmp_path / name, **options)
    return decode_image(tmp_path / name, 8)


def test_transparent_images_are_composited_on_white(tmp_path: Path) -> None:
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    red.paste((255, 0, 0, 255), (0, 0, 4, 8))
    pixels = save(tmp_path, red)
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 7].tolist() == [255, 255, 255]
    assert save(tmp_path, Image.new("LA", (8, 8), (0, 0)))[0, 0].tolist() == [255] * 3
    palette = red.convert("RGB").quantize(4)
    pixels = save(tmp_path, palette, transparency=palette.getpixel((0, 0)))
    assert pixels[0, 0].tolist() == [255, 255, 255]


@pytest.mark.fault(19)
def test_grey_palette_cmyk_and_bilevel(tmp_path: Path) -> None:
    assert save(tmp_path, Image.new("L", (8, 8), 77), "x.jpg")[0, 0].tolist() == [77] * 3
    green = Image.new("RGB", (8, 8), (0, 200, 0))
    assert save(tmp_path, green.quantize(4), "x.gif")[0, 0].tolist() == [0, 200, 0]
    cyan = save(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "x.jpg", quality=95)
    assert np.abs(cyan[0, 0].astype(int) - [0, 255, 255]).max() <= 3
    assert save(tmp_path, Image.new("1", (8, 8), 1))[0, 0].tolist() == [255] * 3


@pytest.mark.fault(19)
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    assert save(tmp_path, grey)[0, 0].tolist() == [128] * 3


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        save(tmp_path, Image.new("F", (8, 8), 0.5), "x.tif")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    image.save(tmp_path / "x.png", exif=exif)
    pixels = decode_image(tmp_path / "x.png", 8)
    assert pixels[:, 4:].min() == 255
    assert pixels[:, :4].max() == 0


@pytest.mark.fault(19)
def test_the_first_frame_and_the_centre_are_used(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    pixels = save(tmp_path, first, "x.gif", save_all=True, append_images=[second])
    assert pixels[0, 0].tolist() == [255, 0, 0]
    wide = Image.new("RGB", (64, 16), "black")
    wide.paste("white", (24, 0, 40, 16))
    assert save(tmp_path, wide)[:, 1:-1].min() == 255


def test_huge_images_are_refused_by_their_header(tmp_path: Path) -> None:
    Image.new("1", (12000, 12000)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="exceeds limit"):
        decode_image(tmp_path / "x.png", 8)


@pytest.mark.fault(18)
@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_a_corrupt_image_is_named_or_skipped(content: bytes | None, tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 12, "test": 6})
    victim = sorted((root / "train" / "ring").iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:200] if content is None else content)
    with pytest.raises(UsageError) as refused:
        load_dataset(folder_config(root))
    assert str(victim) in str(refused.value)
    assert "--data.bad_images skip" in str(refused.value)
    dataset = load_dataset(folder_config(root, bad_images="skip"))
    assert len(dataset.train) == 11
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith(str(victim))
    files = [f for f in sorted((root / "train").rglob("*.png")) if f != victim]
    for row, file in enumerate(files):
        assert np.array_equal(dataset.train.images[row], np.asarray(Image.open(file)))


def test_a_class_without_any_good_image_is_refused(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train": 12, "test": 6})
    for file in (root / "test" / "ring").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UsageError, match="class 'ring' in test"):
        load_dataset(folder_config(root, bad_images="skip"))


@pytest.mark.fault(20, 21)
def test_invalid_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        load_dataset(folder_config(tmp_path / "absent"))
    root = write_folder(tmp_path / "a", {"train": 12, "test": 6})
    (root / "train" / "disc").rename(root / "train" / "dics")
    with pytest.raises(UsageError, match=r"missing in test: dics; only in test: disc"):
        load_dataset(folder_config(root))
    root = write_folder(tmp_path / "b", {"train": 12, "test": 6})
    for file in (root / "train" / "disc").iterdir():
        file.unlink()
    with pytest.raises(UsageError, match=r"class folder .*train/disc holds no image"):
        load_dataset(folder_config(root))
    (tmp_path / "c" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds 0 class folders"):
        load_dataset(folder_config(tmp_path / "c"))


def test_subfolders_and_links_in_a_class_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    disc = root / "train" / "disc"
    first, *others = sorted(disc.iterdir())
    (disc / "more.png").mkdir()  # a folder with the suffix of an image
    first.rename(disc / "more.png" / "deep.PNG")
    (disc / "linked.png").symlink_to(others[0])
    (disc / "notes.txt").write_text("not an image")
    (disc / "loop").symlink_to(root)  # a cycle
    (disc / "gone").symlink_to(root / "absent")
    train = load_dataset(folder_config(root)).train
    assert np.bincount(train.labels).tolist() == [5, 4, 4]
    linked = np.asarray(Image.open(others[0]))
    assert sum(np.array_equal(image, linked) for image in train.images) == 2
    (disc / "gone.jpg").symlink_to(root / "absent")
    with pytest.raises(UsageError, match=r"disc/gone\.jpg: .*No such file"):
        load_dataset(folder_config(root))


def test_the_cache_notices_a_changed_file(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    before = load_dataset(folder_config(root))
    file = sorted((root / "train" / "disc").iterdir())[0]
    Image.new("RGB", (32, 32), "white").save(file)
    after = load_dataset(folder_config(root))
    assert after.train.images[0].min() == 255
    assert after.digest != before.digest


def test_each_image_size_has_its_own_cache_entry(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    for size in (32, 16, 32):
        dataset = load_dataset(folder_config(root, image_size=size))
        assert dataset.train.images.shape == (12, size, size, 3)
        assert dataset.evaluation["test"].image_size == size


def test_files_skipped_by_one_run_are_refused_by_a_run_without_skip(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    sorted((root / "train" / "disc").iterdir())[0].write_bytes(b"no image")
    assert len(load_dataset(folder_config(root, bad_images="skip")).train) == 11
    with pytest.raises(UsageError, match=r"--data\.bad_images skip"):
        load_dataset(folder_config(root))


def test_a_cached_folder_is_not_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    before = load_dataset(folder_config(root))
    monkeypatch.setattr("cifar_dist.data.decode.decode_image", None)
    assert load_dataset(folder_config(root)).digest == before.digest


def test_one_builds_the_cache_while_the_others_wait(tmp_path: Path) -> None:
    builds = []

    def build(writer: object) -> None:
        builds.append(1)
        time.sleep(0.2)
        writer.classes = ("a", "b")  # type: ignore[attr-defined]
        target = writer.create("train", [0, 1], 4)  # type: ignore[attr-defined]
        np.load(target, mmap_mode="r+")[:] = 7

    def load() -> None:
        assert load_or_build(tmp_path, "key", build).splits["train"].images.mean() == 7

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builds == [1]


def test_a_killed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(writer: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_build(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    root = write_folder(tmp_path / "set", {"train": 12, "test": 6})
    with pytest.raises(UsageError, match=r"name another with --data\.cache"):
        load_dataset(folder_config(root, cache=str(blocked / "below")))


def test_the_standard_deviation_of_a_constant_channel_is_set_to_one() -> None:
    images = np.full((2, 4, 4, 3), 51, dtype=np.uint8)
    mean, std = channel_statistics(count_levels(images))
    assert mean == pytest.approx((0.2, 0.2, 0.2))
    assert std == (1.0, 1.0, 1.0)


def test_synthetic_images_are_reproducible_and_not_linearly_separable() -> None:
    train, test = draw(2000, 32, seed=(0, 0)), draw(500, 32, seed=(0, 1))
    assert np.array_equal(train.images, draw(2000, 32, seed=(0, 0)).images)
    assert not np.array_equal(train.images[:500], test.images)
    assert np.bincount(train.labels).tolist() == [200] * 10
    # A linear classifier of the pixels, fitted by least squares, stays near chance.
    x = np.hstack([train.images.reshape(2000, -1) / 255.0 - 0.5, np.ones((2000, 1))])
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ np.eye(10)[train.labels])
    y = np.hstack([test.images.reshape(500, -1) / 255.0 - 0.5, np.ones((500, 1))])
    assert ((y @ weights).argmax(1) == test.labels).mean() < 0.3
