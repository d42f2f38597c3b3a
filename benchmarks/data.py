"""Load the images of a benchmark. torch is imported only where it is used."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cifar_dist.config import DataConfig

if TYPE_CHECKING:
    import torch

    from cifar_dist.data import Dataset


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --root and --cache."""
    parser.add_argument(
        "--root",
        help="folder with train/ and test/ class folders; default: CIFAR-10, downloaded to data/",
    )
    parser.add_argument("--cache", help="folder of decoded datasets")


def same_places(options: argparse.Namespace) -> list[str]:
    """Return --root and --cache as given, for the command line of a subject."""
    given = {"--root": options.root, "--cache": options.cache}
    return [part for option, place in given.items() if place for part in (option, place)]


def data_options(options: argparse.Namespace) -> list[str]:
    """Return the equivalent options of cifar_dist.train."""
    cache = ["--data.cache", options.cache] if options.cache else []
    if not options.root:
        return ["--data.name", "cifar10", *cache]
    return ["--data.name", "imagefolder", "--data.root", options.root, *cache]


def load(options: argparse.Namespace) -> Dataset:
    """Return the dataset. It is decoded on first use."""
    from cifar_dist.data import load_dataset

    if options.root:
        config = DataConfig(name="imagefolder", root=options.root, cache=options.cache)
    else:
        config = DataConfig(name="cifar10", cache=options.cache)
    return load_dataset(config)


def as_tensors(dataset: Dataset, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, uint8 [N, H, W, 3], and labels, int64 [N], of "train" or "test"."""
    import torch

    images = dataset.train if split == "train" else dataset.evaluation[split]
    rows = images.selected
    return torch.from_numpy(images.images[rows]), torch.from_numpy(images.labels[rows])
