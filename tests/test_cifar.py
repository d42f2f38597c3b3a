"""CIFAR archives: small ones from a local server, compared with those that torchvision reads."""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_dist.config import DataConfig
from cifar_dist.data import cifar, load_dataset
from cifar_dist.errors import UsageError
from tests.helpers import Bomb
from tests.server import Handler, Server, whole

CLASSES = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Files = dict[str, bytes]


def small_files(count: int = 3) -> Files:
    """Make the files of CIFAR-10 with `count` images in each, as Python 3 pickles them."""
    random = np.random.default_rng(0)
    batches = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        name: pickle.dumps(
            {
                "data": random.integers(0, 256, (count, 3072)).astype(np.uint8),
                "labels": [(number + row) % 10 for row in range(count)],
            }
        )
        for number, name in enumerate(batches)
    }
    return {**files, "batches.meta": pickle.dumps({"label_names": CLASSES})}


def pack(files: Files, *extra: tarfile.TarInfo, folder: str = "cifar-10-batches-py") -> bytes:
    """Return a compressed archive of `files` in `folder`, plus `extra` headers without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.fileobj.write(info.tobuf())
    return buffer.getvalue()


def publish(
    monkeypatch: pytest.MonkeyPatch,
    files: Files,
    content: bytes = b"",
    dataset: str = "cifar10",
    url: str = "http://127.0.0.1:9/cifar-10-python.tar.gz",
) -> dict[str, Any]:
    """Make the package expect these files in this archive; return the replaced fields."""
    changes = {
        "url": url,
        "sha256": hashlib.sha256(content).hexdigest(),
        "md5": {name: hashlib.md5(data).hexdigest() for name, data in files.items()},
    }
    changed = dataclasses.replace(cifar.ARCHIVES[dataset], **changes)
    monkeypatch.setitem(cifar.ARCHIVES, dataset, changed)
    return changes


def unpack(files: Files, root: Path, folder: str = "cifar-10-batches-py") -> None:
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)


def as_torchvision_reads(files: Files, root: Path, dataset: str = "cifar10") -> list[Any]:
    """Return the train and test split as torchvision reads them: it unpickles the files."""
    import torchvision

    archive = cifar.ARCHIVES[dataset]
    base = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    hashes = {
        "train_list": [[name, archive.md5[name]] for name in archive.train],
        "test_list": [[name, archive.md5[name]] for name in archive.test],
        "meta": {
            "filename": archive.meta,
            "key": archive.names,
            "md5": archive.md5[archive.meta],
        },
    }
    unpack(files, root, archive.folder)
    reader = type("Reader", (base[dataset],), hashes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns about dtypes pickled by Python 2
        return [reader(root, train=train) for train in (True, False)]


def load(root: Path, dataset: str = "cifar10", **changes: Any) -> Any:
    return load_dataset(DataConfig(name=dataset, root=str(root), **changes))


def refusal(root: Path) -> str:
    """Check that loading fails with one line, and return it."""
    with pytest.raises(UsageError) as refused:
        load(root)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_archive_is_downloaded_once_and_cached(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    server = serve(pack(files))
    publish(monkeypatch, files, server.content, url=server.url("cifar-10-python.tar.gz"))
    root = tmp_path / "data"
    dataset = load(root)
    assert len(dataset.train) == 15
    assert len(dataset.evaluation["test"]) == 3
    assert dataset.classes[0] == "airplane"
    train, test = as_torchvision_reads(files, tmp_path / "reference")
    assert np.array_equal(dataset.train.images, train.data)
    assert dataset.train.labels.tolist() == train.targets
    assert np.array_equal(dataset.evaluation["test"].images, test.data)
    again = load(tmp_path / "elsewhere")
    assert again.digest == dataset.digest
    large = load(root, image_size=48)
    assert large.train.images.shape == (15, 48, 48, 3)
    assert server.requests == 1


def test_a_failed_download_is_reported_in_one_line_with_a_remedy(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish(monkeypatch, small_files(), b"nobody sends this")
    message = refusal(tmp_path / "data")
    assert "Connection refused" in message
    assert "put cifar-10-python.tar.gz there" in message
    assert "--data.name synthetic" in message


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path / "data")))


def test_the_expected_files_are_those_that_torchvision_names() -> None:
    import torchvision

    classes = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    for name, published in classes.items():
        archive = cifar.ARCHIVES[name]
        listed = dict([*published.train_list, *published.test_list])
        assert archive.md5 == {**listed, published.meta["filename"]: published.meta["md5"]}
        assert [*archive.train, *archive.test] == list(listed)
        assert (archive.url, archive.name) == (published.url, published.filename)
        assert (archive.folder, archive.names) == (published.base_folder, published.meta["key"])


# Files that data.root already has


@pytest.mark.parametrize("place", ["archive", "folder"])
def test_existing_files_are_used(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    content = pack(files)
    publish(monkeypatch, files, content)
    if place == "archive":
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    else:
        unpack(files, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(load(tmp_path).train) == 15
    assert sorted(tmp_path.rglob("*")) == before


def test_an_archive_with_another_hash_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    expected = publish(monkeypatch, files, pack(files))["sha256"]
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half an archi")
    message = refusal(tmp_path)
    assert expected in message
    assert hashlib.sha256(b"half an archi").hexdigest() in message
    assert "remove it" in message


def test_a_folder_with_other_files_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    expected = publish(monkeypatch, files)["md5"]["data_batch_3"]
    unpack(files, tmp_path)
    victim = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    victim.write_bytes(b"something else")
    message = refusal(tmp_path)
    assert expected in message
    assert hashlib.md5(b"something else").hexdigest() in message
    assert str(victim) in message
    victim.unlink()
    assert f"{victim} is missing" in refusal(tmp_path)


# Content of the files


def old_string(data: bytes) -> bytes:
    """Pickle a string as Python 2 did."""
    head = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
    return head + data


def old_list(entries: list[bytes]) -> bytes:
    """Pickle a list as Python 2 did: a thousand entries at a time."""
    parts = [entries[start : start + 1000] for start in range(0, len(entries), 1000)]
    return b"]q\x05" + b"".join(b"(" + b"".join(part) + b"e" for part in parts)


def old_batch(pixels: np.ndarray, labels: list[int], key: str) -> bytes:
    """Pickle images, uint8 [N, 3072], as Python 2 and its numpy did for the published files."""
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M\x00\x0c\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01" + shape + b"cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + old_string(pixels.tobytes())
        + b"tb"
    )
    names = old_list([old_string(b"image_%d.png" % row) for row in range(len(pixels))])
    return (
        b"\x80\x02}q\x01("
        + (old_string(b"batch_label") + b"q\x02" + old_string(b"batch 1 of 5") + b"q\x03")
        + (old_string(key.encode()) + b"q\x04")
        + old_list([b"K" + bytes([label]) for label in labels])
        + (old_string(b"coarse_labels") + old_list([b"K\x07" for _ in labels]))
        + (old_string(b"data") + b"q\x06" + array)
        + (old_string(b"filenames") + b"q\x0c" + names)
        + b"u."
    )


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_files_as_python_2_wrote_them(
    dataset: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archive = cifar.ARCHIVES[dataset]
    classes = [f"class {number}" for number in range(10 if dataset == "cifar10" else 100)]
    random = np.random.default_rng(1)
    files = {
        archive.meta: b"\x80\x02}q\x01("
        + (old_string(b"num_vis") + b"M\x00\x0c" + old_string(archive.names.encode()))
        + old_list([old_string(name.encode()) for name in classes])
        + b"u."
    }
    for name in (*archive.train, *archive.test):
        count = 2001 if name == archive.train[-1] else 3  # a list has parts of 1000 entries
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = random.integers(0, len(classes), count).tolist()
        files[name] = old_batch(pixels, labels, archive.labels)
    publish(monkeypatch, files, dataset=dataset)
    train, test = as_torchvision_reads(files, tmp_path, dataset)
    loaded = load(tmp_path, dataset)
    for found, expected in ((loaded.train, train), (loaded.evaluation["test"], test)):
        assert np.array_equal(found.images, expected.data)
        assert found.labels.tolist() == expected.targets
    assert list(loaded.classes) == classes == train.classes


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_files_as_python_3_writes_them(
    protocol: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {**small_files(count=1001), "data_batch_2": small_files(count=1)["data_batch_2"]}
    for name, content in files.items():
        values = {"nested": [[1, 2], [3, 4], []], **pickle.loads(content)}
        files[name] = pickle.dumps(values, protocol)
    publish(monkeypatch, files)
    train, _ = as_torchvision_reads(files, tmp_path)
    loaded = load(tmp_path)
    assert np.array_equal(loaded.train.images, train.data)
    assert loaded.train.labels.tolist() == train.targets


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (pickle.dumps({"data": PIXELS, "labels": [1, 2, 3]}), "2 images and 3 labels"),
        (pickle.dumps({"data": PIXELS, "labels": [1, 10]}), "1 are from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": [1, -1]}), "1 are from 0 to 9"),
        (pickle.dumps({"data": PIXELS, "labels": ["1", "2"]}), "0 are from 0 to 9"),
        (pickle.dumps({"data": PIXELS}), "no list 'labels'"),
        (pickle.dumps({"data": PIXELS, "labels": 7}), "no list 'labels'"),
        (pickle.dumps({"data": PIXELS[:, :-1], "labels": [1, 2]}), "no array 'data'"),
        (pickle.dumps({"data": PIXELS.astype(float), "labels": [1, 2]}), "no array 'data'"),
        (pickle.dumps({"data": PIXELS.tolist(), "labels": [1, 2]}), "no array 'data'"),
        (pickle.dumps({"labels": [1, 2]}), "no array 'data'"),
        (pickle.dumps([1, 2]), "no dict"),
        (pickle.dumps({"data": PIXELS, "labels": [1, 2]})[:-9], "cannot be unpickled"),
        (b"<html>", "cannot be unpickled"),
        (b"", "cannot be unpickled"),
    ],
)
def test_a_malformed_batch_is_named(
    content: bytes, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {**small_files(), "data_batch_2": content}
    publish(monkeypatch, files)
    unpack(files, tmp_path)
    message = refusal(tmp_path)
    assert problem in message
    assert "data_batch_2" in message


@pytest.mark.fault(34)
@pytest.mark.parametrize("place", ["archive", "folder"])
@pytest.mark.parametrize("victim", ["data_batch_1", "batches.meta"])
def test_a_pickle_bomb_is_never_executed(
    victim: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    marker, files = tmp_path / "marker", small_files()
    alone = {**files, victim: pickle.dumps(Bomb(marker))}
    hidden = {**files, victim: pickle.dumps({"a": Bomb(marker), **pickle.loads(files[victim])})}
    for bombed in (alone, hidden):
        pickle.loads(bombed[victim])
        assert marker.exists()  # without the protection, the code runs
        marker.unlink()
        root = tmp_path / ("alone" if bombed is alone else "hidden")
        content = pack(bombed)
        publish(monkeypatch, bombed, content)
        unpack(bombed if place == "folder" else {}, root)
        if place == "archive":
            (root / "cifar-10-python.tar.gz").write_bytes(content)
        message = refusal(root)
        assert f"'{victim}' of CIFAR cannot be unpickled" in message
        assert "is not allowed" in message
        assert not marker.exists()


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "builtins\ngetattr", "os\nsystem", "numpy\nload", "numpy.core\nmultiarray"],
)
def test_only_the_functions_of_a_pickled_array_can_be_unpickled(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {**small_files(), "data_batch_2": b"c" + name.encode() + b"\n."}
    publish(monkeypatch, files)
    unpack(files, tmp_path)
    assert f"{name.replace(chr(10), '.')} is not allowed" in refusal(tmp_path)


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


VICTIM = "cifar-10-batches-py/data_batch_1"


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (member("../evil"), f"'{VICTIM}' is not in it"),
        (member("/tmp/cifar-dist-evil"), f"'{VICTIM}' is not in it"),
        (member("cifar-10-batches-py/../data_batch_1"), f"'{VICTIM}' is not in it"),
        (member(VICTIM, tarfile.SYMTYPE, "/etc/passwd"), f"'{VICTIM}' in it is not a regular file"),
        (member(VICTIM, tarfile.LNKTYPE, "../evil"), f"'{VICTIM}' in it is not a regular file"),
        (member(VICTIM, tarfile.CHRTYPE), f"'{VICTIM}' in it is not a regular file"),
        (member(VICTIM, tarfile.FIFOTYPE), f"'{VICTIM}' in it is not a regular file"),
        (member(VICTIM, size=10 << 30), f"'{VICTIM}' in it has 10737418240 bytes"),
        (member("readme.html", size=10 << 30), "'readme.html' in it has 10737418240 bytes"),
    ],
)
def test_an_archive_with_a_bad_member_is_refused(
    bad: tarfile.TarInfo, problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    del files["data_batch_1"]
    content = pack(files, bad)
    publish(monkeypatch, small_files(), content)
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(content)
    assert problem in refusal(root)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "cifar-10-python.tar.gz"]
    assert not Path("/tmp/cifar-dist-evil").exists()


@pytest.mark.fault(36)
def test_ten_gigabytes_of_zeros_are_not_unpacked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cifar, "LARGEST_MEMBER", 1_000_000)
    content = pack({"data_batch_1": bytes(20_000_000)})  # a small version of it
    assert len(content) < 200_000
    publish(monkeypatch, small_files(), content)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
    assert f"'{VICTIM}' in it has 20000000 bytes" in refusal(tmp_path)


@pytest.mark.fault(36)
def test_only_the_expected_members_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = small_files()
    others = [member("cifar-10-batches-py", tarfile.DIRTYPE), member("../evil")]
    others += [member("evil", tarfile.SYMTYPE, "/etc"), member("evil/passwd")]
    content = pack(files, *others)
    publish(monkeypatch, files, content)
    root = tmp_path / "data"
    root.mkdir()
    (root / "cifar-10-python.tar.gz").write_bytes(content)
    assert len(load(root).train) == 15
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "cifar-10-python.tar.gz"]


def test_a_file_that_is_not_an_archive_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole_archive = pack(small_files())
    for content in (b"no archive", whole_archive[:-1000]):
        publish(monkeypatch, small_files(), content)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(content)
        assert "cannot be used" in refusal(tmp_path)


LOADER = """
import dataclasses, json, sys
from cifar_dist.config import DataConfig
from cifar_dist.data import cifar, load_dataset

root, cache, changes = sys.argv[1:]
archive = dataclasses.replace(cifar.ARCHIVES["cifar10"], **json.loads(changes))
cifar.ARCHIVES["cifar10"] = archive
print("ready", flush=True)
sys.stdin.readline()
print(load_dataset(DataConfig(name="cifar10", root=root, cache=cache)).digest)
"""


@pytest.mark.fault(38)
def test_four_processes_download_once(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def slow(handler: Handler) -> None:
        time.sleep(0.5)  # so that the other processes find no file either
        whole(handler)

    files = small_files()
    server = serve(pack(files), slow)
    url = server.url("cifar-10-python.tar.gz")
    changes = json.dumps(publish(monkeypatch, files, server.content, url=url))
    processes = [
        subprocess.Popen(
            # One cache per process, so that they share only the lock of the download.
            [sys.executable, "-c", LOADER, tmp_path / "data", tmp_path / f"cache{rank}", changes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for rank in range(4)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    digests = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4
    assert len(digests) == 1
    assert server.requests == 1
