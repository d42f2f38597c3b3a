"""Counts of images and classes that are known before a dataset is loaded."""

import pytest

from cifar_dist.config import DataConfig
from cifar_dist.data import DATASETS
from cifar_dist.data.counts import COUNTED, count_images
from cifar_dist.errors import UsageError


def test_a_dataset_that_cannot_be_counted_is_refused() -> None:
    assert COUNTED.keys() == DATASETS.keys()
    fifth = DataConfig(name="fifth")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"number of images of data\.name fifth is unknown"):
        count_images(fifth)


def test_both_datasets_of_cifar_are_counted() -> None:
    for classes in (10, 100):
        found = count_images(DataConfig(name=f"cifar{classes}"))  # type: ignore[arg-type]
        assert len(found.train) == 50_000
        assert {name: len(images) for name, images in found.evaluation.items()} == {"test": 10_000}
        assert len(found.classes) == classes
