"""Count the images and classes of a dataset without downloading, drawing or decoding any."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cifar_dist.config import DataConfig, local_path
from cifar_dist.data import Dataset, arrange
from cifar_dist.data.cifar import CLASSES, SIZES
from cifar_dist.data.images import Images, Source
from cifar_dist.data.listing import find_images, labels_of
from cifar_dist.data.synthetic import SHAPES, counts
from cifar_dist.errors import require

# The labels of each split, and the classes.
Counted = tuple[Mapping[str, Sequence[int] | np.ndarray], tuple[str, ...]]


def _count_cifar(config: DataConfig) -> Counted:
    classes = tuple(map(str, range(CLASSES[config.name])))
    return {split: np.arange(size) % len(classes) for split, size in SIZES.items()}, classes


def _count_synthetic(config: DataConfig) -> Counted:
    sizes = counts(config)
    return {split: np.arange(size) % len(SHAPES) for split, size in sizes.items()}, tuple(SHAPES)


def _count_folder(config: DataConfig) -> Counted:
    listing = find_images(local_path(config.root), config.bad_images)
    return {split: labels_of(found) for split, found in listing.files.items()}, listing.classes


COUNTED: dict[str, Callable[[DataConfig], Counted]] = {
    "cifar10": _count_cifar,
    "cifar100": _count_cifar,
    "imagefolder": _count_folder,
    "synthetic": _count_synthetic,
}


def count_images(config: DataConfig) -> Dataset:
    """Return the dataset that `load_dataset` would, without any pixels: images of no channels.

    Raises:
        UsageError: the folder of images is missing or not one of class folders, or the number of
            images of this dataset is unknown.
    """
    require(
        config.name in COUNTED,
        f"the number of images of data.name {config.name} is unknown before they are loaded; "
        f"known: {', '.join(COUNTED)}",
    )
    labels, classes = COUNTED[config.name](config)
    side = config.side
    splits = {
        name: Images(np.empty((len(found), side, side, 0), np.uint8), np.array(found), classes)
        for name, found in labels.items()
    }
    return arrange(Source(splits, (), (), "", ()), config)
