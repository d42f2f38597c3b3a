"""The cache of decoded images: a damaged entry is detected and built again."""

import copy
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar_dist.config import DataConfig
from cifar_dist.data import Dataset, cache, load_dataset
from cifar_dist.data.cache import CacheWriter, load_or_build
from cifar_dist.errors import UsageError
from tests.helpers import obeying_modes, write_folder

COUNTS = {"train": 12, "val": 12, "test": 12}  # equal, so that files of splits can be swapped


class Folder:
    """A folder of images, one of which cannot be decoded, with its cache entry."""

    def __init__(self, root: Path, store: Path) -> None:
        if not root.is_dir():
            write_folder(root, COUNTS, size=8)
        (root / "train" / "ring" / "broken.png").write_bytes(b"no image")
        self.root, self.store = root, store
        self.config = DataConfig(
            name="imagefolder", root=str(root), cache=str(store), image_size=8, bad_images="skip"
        )
        before = set(store.glob("*-v*")) if store.is_dir() else set()
        self.expected = copy.deepcopy(load_dataset(self.config))  # not memory-mapped from the cache
        (self.entry,) = set(store.glob("*-v*")) - before

    def load(self) -> Dataset:
        """Load the dataset, and check that it equals the one decoded without a cache."""
        found, expected = load_dataset(self.config), self.expected
        assert list(found.evaluation) == list(expected.evaluation) == ["val", "test"]
        pairs = [(found.train, expected.train)]
        pairs += [(found.evaluation[name], expected.evaluation[name]) for name in found.evaluation]
        for one, other in pairs:
            assert one.classes == other.classes
            assert np.array_equal(one.images, other.images)
            assert np.array_equal(one.labels, other.labels)
            assert np.array_equal(one.digests, other.digests)  # type: ignore[arg-type]
        assert (found.mean, found.std) == (expected.mean, expected.std)
        assert (found.digest, found.skipped) == (expected.digest, expected.skipped)
        assert len(found.skipped) == 1
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "set", tmp_path / "cache")


def two_folders(tmp_path: Path) -> tuple[list[Folder], Path]:
    """Return two folders with cache entries of equal size, and an old entry of the first."""
    first = Folder(tmp_path / "a", tmp_path / "cache")
    old = Path(shutil.copytree(first.entry, tmp_path / "old"))
    for number, image in enumerate(sorted((tmp_path / "a").rglob("*.png"))):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(image)
    first = Folder(tmp_path / "a", tmp_path / "cache")
    second = Folder(tmp_path / "b", tmp_path / "cache")
    for config, side in ((first.config, 16), (second.config, 16)):  # entries that nothing damages
        load_dataset(DataConfig(**{**vars(config), "image_size": side}))
    return [first, second], old


def damage(chance: random.Random, folders: list[Folder], old: Path) -> str:
    """Damage one cache entry, often keeping the mtime of the file; return a description."""
    one, other = chance.sample(folders, 2)
    file = chance.choice([f for f in sorted(one.entry.iterdir()) if (old / f.name).exists()])
    theirs = other.entry / file.name
    status, content = file.stat(), bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    kinds = ["delete", "truncate", "flip", "zero", "swap", "stale", "entry", "extra"]
    kind = chance.choice(kinds)
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        os.truncate(file, place)
    elif kind == "flip":
        content[place] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    elif kind == "zero":
        content[place:] = bytes(len(content) - place)
        file.write_bytes(content)
    elif kind == "swap":  # with the other entry or with another split
        splits = [one.entry / file.name.replace("train", split) for split in ("val", "test")]
        theirs = chance.choice([theirs, *splits])
        spare = one.entry / "spare"
        if theirs != file and theirs.exists():
            file.rename(spare)
            theirs.rename(file)
            spare.rename(theirs)
    elif kind == "stale":
        shutil.copy2(old / file.name, file)
    elif kind == "entry":
        shutil.rmtree(one.entry)
        shutil.copytree(chance.choice([old, other.entry]), one.entry)
    else:
        shutil.copy2(file, one.entry / "more-images.npy")
    if file.is_file() and chance.random() < 0.7:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return f"{kind} {one.root.name} {file.name}"


@pytest.mark.fault(43)
@pytest.mark.parametrize("times", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damage_to_the_cache_never_changes_the_loaded_images(
    times: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders, old = two_folders(tmp_path)
    chance, warnings = random.Random(times), 0
    for _ in range(times):
        damages = [damage(chance, folders, old) for _ in range(chance.choice([1, 1, 2]))]
        for each in folders:
            try:
                each.load()
            except BaseException:
                print(damages)
                raise
            printed = capfd.readouterr()
            said = (printed.out + printed.err).splitlines()
            assert all(line.startswith("warning: the cached images in ") for line in said), said
            assert len(said) <= 1
            warnings += len(said)
            assert not list(each.store.glob(".*-*"))
    assert warnings > 0.6 * times


def remove(entry: Path) -> None:
    (entry / "val-images.npy").unlink()


def remove_both(entry: Path) -> None:
    (entry / "val-images.npy").unlink()
    (entry / "val-labels.npy").unlink()


def truncate(entry: Path) -> None:
    os.truncate(entry / "train-images.npy", 1000)


def blacken(entry: Path) -> None:
    array = np.load(entry / "train-images.npy", mmap_mode="r+")
    array[:] = 0
    array.flush()


def change_mean(entry: Path) -> None:
    content = json.loads((entry / "meta.json").read_text())
    content["entry"]["mean"][0] += 1e-9
    (entry / "meta.json").write_text(json.dumps(content))


def empty(entry: Path) -> None:
    for file in entry.iterdir():
        file.unlink()


def be_a_file(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("")


@pytest.mark.parametrize(
    ("hurt", "found"),
    [
        (remove, "val-images.npy: No such file or directory"),
        (remove_both, "val-images.npy: No such file or directory"),
        (truncate, "train-images.npy: 1000 bytes, expected 2432"),
        (blacken, "train-images.npy: the SHA-256 differs"),
        (change_mean, "meta.json: the SHA-256 differs"),
        (empty, "meta.json: [Errno 2] No such file or directory"),
        (be_a_file, "meta.json: [Errno 20] Not a directory"),
    ],
)
def test_one_line_names_the_file_that_is_damaged(
    hurt: Callable[[Path], None],
    found: str,
    folder: Folder,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hurt(folder.entry)
    folder.load()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: the cached images in {folder.entry} are damaged ({found}")
    assert line.endswith("; decoding them again")
    folder.load()
    assert capfd.readouterr().err == ""


def test_a_copied_entry_is_hashed_once_and_used(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder.entry, folder.store / "copy")
    shutil.rmtree(folder.entry)
    (folder.store / "copy").rename(folder.entry)
    hashed = []
    original = cache.sha256_of
    monkeypatch.setattr("cifar_dist.data.decode.decode_image", None)
    monkeypatch.setattr(
        cache, "sha256_of", lambda file: (hashed.append(Path(file.name).name), original(file))[1]
    )
    folder.load()
    assert sum(name.endswith("images.npy") for name in hashed) == 3
    hashed.clear()
    folder.load()
    assert sum(name.endswith("images.npy") for name in hashed) == 0


def test_a_mapped_entry_stays_readable_while_it_is_rebuilt(folder: Folder) -> None:
    train = folder.load().train.images.copy()
    mapped = load_dataset(folder.config)
    remove(folder.entry)
    folder.load()
    assert np.array_equal(mapped.train.images, train)


@contextmanager
def only_readable(folder: Folder) -> Iterator[None]:
    paths = [folder.store, folder.entry, *folder.entry.iterdir()]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & 0o555)
    try:
        with obeying_modes():
            yield
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


def test_a_read_only_cache_is_used_if_it_is_intact(folder: Folder) -> None:
    with only_readable(folder):
        folder.load()
    truncate(folder.entry)
    with only_readable(folder), pytest.raises(UsageError) as refused:
        folder.load()
    assert str(refused.value) == (
        f"the cached images in {folder.entry} are damaged (train-images.npy: 1000 bytes, expected "
        f"2432), and the cache folder {folder.store} cannot be written (Permission denied); name "
        "another with --data.cache"
    )


@pytest.mark.fault(44)
@pytest.mark.parametrize("what", ["train-images.npy", "meta.json", "."])
def test_an_unreadable_entry_is_named(what: str, folder: Folder) -> None:
    path = folder.entry / what
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with obeying_modes(), pytest.raises(UsageError) as refused:
            load_dataset(folder.config)
    finally:
        path.chmod(mode)
    named = folder.entry / ("meta.json" if what == "." else what)
    assert str(refused.value) == (
        f"the cached images in {named} cannot be read by this user (Permission denied); correct "
        "the permissions, or name another folder with --data.cache"
    )


def test_the_mode_of_an_entry_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        entry = Folder(tmp_path / "set", tmp_path / "cache").entry
    finally:
        os.umask(before)
    assert entry.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in entry.iterdir()} == {0o640}


def sevens(writer: CacheWriter) -> None:
    writer.classes = ("a", "b")
    np.load(writer.create("train", [0, 1], 4), mmap_mode="r+")[:] = 7


def test_an_entry_of_the_old_format_is_built_again(tmp_path: Path) -> None:
    old = tmp_path / "cifar10-32"
    old.mkdir()
    np.save(old / "train-images.npy", np.zeros((2, 4, 4, 3), np.uint8))
    np.save(old / "train-labels.npy", np.zeros(2, np.int64))
    meta = {"classes": ["a", "b"], "skipped": [], "mean": [0] * 3, "std": [1] * 3, "digest": ""}
    (old / "meta.json").write_text(json.dumps(meta))
    assert load_or_build(tmp_path, "cifar10-32", sevens).splits["train"].images.mean() == 7


@pytest.mark.parametrize("damaged", [False, True])
def test_two_machines_without_a_common_lock_build_at_the_same_time(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_build(tmp_path, "key", sevens)
    if damaged:
        (tmp_path / "key-v2" / "train-images.npy").unlink()
    else:
        shutil.rmtree(tmp_path / "key-v2")
    monkeypatch.setattr(cache.filelock, "FileLock", lambda path: nullcontext())
    monkeypatch.setattr(cache.platform, "node", lambda: threading.current_thread().name)
    together, means = threading.Barrier(4), []

    def build(writer: CacheWriter) -> None:
        sevens(writer)
        together.wait()

    def load() -> None:
        means.append(load_or_build(tmp_path, "key", build).splits["train"].images.mean())

    threads = [threading.Thread(target=load, name=f"machine{n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert means == [7] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key-v2", "key.lock"]


@pytest.mark.fault(45)
def test_an_entry_is_synced_to_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def syncing(descriptor: int) -> None:
        calls.append(f"sync {os.fstat(descriptor).st_ino}")
        fsync(descriptor)

    def replacing(source: Path, target: Path) -> None:
        calls.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    load_or_build(tmp_path, "key", sevens)
    named = calls.index("rename key-v2")
    entry = tmp_path / "key-v2"
    for path in (*entry.iterdir(), entry):
        assert f"sync {path.stat().st_ino}" in calls[:named], path
    assert f"sync {tmp_path.stat().st_ino}" in calls[named:]
