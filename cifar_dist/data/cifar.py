"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from the archives that their author publishes.

A file is read only after its hash has been verified, and nothing is unpacked to disk. The batches
are pickles, which may run any code when they are loaded; the unpickler here admits only arrays.
"""

import hashlib
import io
import pickle
import tarfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifar_dist.config import DataConfig, local_path
from cifar_dist.data.cache import CacheWriter, cache_folder, load_or_build
from cifar_dist.data.download import download
from cifar_dist.data.images import Source
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.files import sha256_of

LARGEST_MEMBER = 160_000_000  # bytes; "train" of CIFAR-100 has 155,249,918

# The functions that a pickled array names, as numpy 1 and numpy 2 call them.
PICKLED_ARRAY = {
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.numeric._frombuffer",
}


@dataclass(frozen=True)
class Archive:
    """A published archive and its content.

    Attributes:
        url: address of the archive.
        sha256: SHA-256 of the archive.
        folder: folder in the archive that holds all files.
        train, test: names of the files with the images of each split.
        meta: name of the file with the class names.
        md5: MD5 of each of these files, by name.
        labels: key of the labels in the batches.
        names: key of the class names in the meta file.
    """

    url: str
    sha256: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    md5: dict[str, str]
    labels: str
    names: str

    @property
    def name(self) -> str:
        """The archive's file name."""
        return self.url.rpartition("/")[2]


ARCHIVES = {
    "cifar10": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        meta="batches.meta",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        labels="labels",
        names="label_names",
    ),
    "cifar100": Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        meta="meta",
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        labels="fine_labels",
        names="fine_label_names",
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}
SIZES = {"train": 50_000, "test": 10_000}  # images of each split


def load_cifar(config: DataConfig) -> Source:
    """Load the dataset; download it into data.root if neither cache nor root holds it.

    Raises:
        UsageError: it is absent and cannot be downloaded, or its files are not the published ones.
    """
    size = config.side

    def build(writer: CacheWriter) -> None:
        archive = ARCHIVES[config.name]
        files = _read_files(root, config.name)
        writer.classes = _read_classes(archive.meta, files[archive.meta], archive.names)
        for split, names in (("train", archive.train), ("test", archive.test)):
            batches = [
                _read_batch(name, files[name], archive.labels, len(writer.classes))
                for name in names
            ]
            labels = [label for _, found in batches for label in found]
            array = np.load(writer.create(split, labels, size), mmap_mode="r+")
            for row, image in enumerate(image for images, _ in batches for image in images):
                array[row] = image if size == 32 else _resized(image, size)

    root = local_path(config.root)
    if root.exists() and not root.is_dir():
        raise UsageError(f"data.root '{config.root}' is a file; name a folder")
    return load_or_build(cache_folder(config), f"{config.name}-{size}", build)


def _read_files(root: Path, dataset: str) -> dict[str, bytes]:
    """Return the content of the files inside the archive, by name.

    They are read from the first of these that exists:
    1. the archive in `root`;
    2. the unpacked folder in `root`;
    3. the archive, which is then downloaded into `root`.
    """
    archive = ARCHIVES[dataset]
    path, folder = root / archive.name, root / archive.folder
    try:
        if not path.exists() and folder.is_dir():
            return _read_folder(folder, archive)
        if not path.exists():
            _download(dataset, archive, path)
        return _read_archive(path, archive)
    except OSError as error:
        raise UsageError(
            f"{error.filename or path} cannot be read ({error.strerror or error}); make it "
            "readable, or name another folder with --data.root"
        ) from error


def _download(dataset: str, archive: Archive, path: Path) -> None:
    try:
        download(archive.url, path, archive.sha256)
    except UsageError as error:
        raise UsageError(
            f"{dataset} is not in '{path.parent}' and could not be downloaded ({error}); put "
            f"{path.name} there, or train on --data.name synthetic or imagefolder"
        ) from error


def _read_archive(path: Path, archive: Archive) -> dict[str, bytes]:
    remedy = "remove it to have it downloaded again"
    with path.open("rb") as file:
        found = sha256_of(file)
        require(
            found == archive.sha256,
            f"{path} has SHA-256 {found}, expected {archive.sha256}; {remedy}",
        )
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:gz") as tar:
                return _read_members(tar, archive)
        except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
            raise UsageError(f"{path} cannot be used: {error}; {remedy}") from error


def _read_members(tar: tarfile.TarFile, archive: Archive) -> dict[str, bytes]:
    """Return the content of the expected members; other members are ignored.

    Raises:
        ValueError: one is missing or not a regular file, or any member is too large.
    """
    contents = {}
    for member in tar:
        if not 0 <= member.size <= LARGEST_MEMBER:
            raise ValueError(f"{member.name!r} in it has {member.size} bytes")
        folder, _, name = member.name.rpartition("/")
        if folder == archive.folder and name in archive.md5:
            stream = tar.extractfile(member) if member.isreg() else None
            if stream is None:
                raise ValueError(f"{member.name!r} in it is not a regular file")
            contents[name] = stream.read()
    for name in archive.md5:
        if name not in contents:
            raise ValueError(f"'{archive.folder}/{name}' is not in it")
    return contents


def _read_folder(folder: Path, archive: Archive) -> dict[str, bytes]:
    remedy = f"remove {folder} to have the archive downloaded, or put {archive.name} beside it"
    contents = {}
    for name, expected in archive.md5.items():
        path = folder / name
        require(
            path.is_file() and path.stat().st_size <= LARGEST_MEMBER,
            f"{path} is missing, or not a file of at most {LARGEST_MEMBER} bytes; {remedy}",
        )
        contents[name] = path.read_bytes()
        # MD5 is weak against forgery, but no better hash is published; unpickling is safe anyway.
        found = hashlib.md5(contents[name], usedforsecurity=False).hexdigest()
        require(found == expected, f"{path} has MD5 {found}, expected {expected}; {remedy}")
    return contents


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and numpy arrays; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PICKLED_ARRAY:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)


def _unpickle(name: str, content: bytes) -> dict[str, Any]:
    """Return the dict that a file of CIFAR holds.

    Raises:
        UsageError: the file is damaged, or holds something else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy deprecates the dtypes that Python 2 pickled
        try:
            values = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
        except Exception as error:  # damaged pickles raise almost anything
            reason = one_line(error, None)
            raise UsageError(f"'{name}' of CIFAR cannot be unpickled ({reason})") from error
    require(isinstance(values, dict), f"'{name}' of CIFAR holds no dict")
    return dict(values)


def _read_classes(name: str, content: bytes, key: str) -> tuple[str, ...]:
    found = _unpickle(name, content).get(key)
    if not (isinstance(found, list) and found and all(isinstance(entry, str) for entry in found)):
        raise UsageError(f"'{name}' of CIFAR holds no list '{key}' of class names")
    return tuple(found)


def _read_batch(name: str, content: bytes, key: str, classes: int) -> tuple[np.ndarray, list[int]]:
    """Return the images uint8 [N, 32, 32, 3] and the N labels of one batch."""
    values = _unpickle(name, content)
    data, found = values.get("data"), values.get(key)
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape[1:] == (3072,)):
        raise UsageError(f"'{name}' of CIFAR holds no array 'data' of uint8 [N, 3072]")
    if not isinstance(found, list):
        raise UsageError(f"'{name}' of CIFAR holds no list '{key}'")
    labels = [entry for entry in found if isinstance(entry, int) and 0 <= entry < classes]
    require(
        len(data) == len(labels) == len(found),
        f"'{name}' of CIFAR holds {len(data)} images and {len(found)} {key}, of which "
        f"{len(labels)} are from 0 to {classes - 1}; expected as many of each",
    )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
