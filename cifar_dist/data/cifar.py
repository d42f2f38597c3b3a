"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), downloaded and checked by torchvision."""

from pathlib import Path

import numpy as np
from PIL import Image

from cifar_dist.config import DataConfig, UsageError, cache_folder
from cifar_dist.data.cache import CacheWriter, load_or_build
from cifar_dist.data.images import Source

ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


def load_cifar(config: DataConfig) -> Source:
    """Return the dataset, downloading it into data.root if neither cache nor root holds it.

    Raises:
        UsageError: it is absent and cannot be downloaded, or its files are damaged.
    """
    size = config.image_size or 32

    def build(writer: CacheWriter) -> None:
        import torchvision  # seconds to import, so only when something is to be read

        dataset = {
            "cifar10": torchvision.datasets.CIFAR10,
            "cifar100": torchvision.datasets.CIFAR100,
        }[config.name]
        for split in ("train", "test"):
            try:
                part = dataset(config.root, train=split == "train", download=True)
            except (OSError, RuntimeError) as error:
                raise UsageError(
                    f"{config.name} is not in '{config.root}' and could not be downloaded "
                    f"({' '.join(str(error).split())}); put {ARCHIVES[config.name]} there, or "
                    "train on --data.name synthetic or imagefolder"
                ) from error
            array = writer.create(split, part.targets, size)
            for row, image in enumerate(part.data):
                array[row] = image if size == 32 else _resized(image, size)
            writer.classes = tuple(part.classes)

    root = Path(config.root).expanduser()
    if root.exists() and not root.is_dir():
        raise UsageError(f"data.root '{config.root}' is a file; name a folder")
    return load_or_build(cache_folder(config), f"{config.name}-{size}", build)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
