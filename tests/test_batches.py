"""Sample order: the samples of each batch of an epoch."""

import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from cifar_dist.data.batches import (
    GlobalBatches,
    ImageDataset,
    build_evaluation_loader,
    permutation,
)
from cifar_dist.data.images import Images
from cifar_dist.data.synthetic import draw


def test_an_epoch_is_a_permutation_without_the_incomplete_batch() -> None:
    batches = GlobalBatches(103, 10, seed=1)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 10
    assert all(len(batch) == 10 for batch in epoch)
    assert len(set(torch.cat(epoch).tolist())) == 100
    assert torch.equal(torch.cat(epoch), permutation(103, 1, 0)[:100])


def test_an_epoch_can_start_at_any_batch_and_epochs_differ() -> None:
    batches = GlobalBatches(100, 10, seed=1)
    first = list(batches)
    batches.start_at(0, 7)
    assert torch.equal(torch.cat(list(batches)), torch.cat(first[7:]))
    batches.start_at(0, 7, 9)
    assert torch.equal(torch.cat(list(batches)), torch.cat(first[7:9]))
    batches.start_at(1, 0)
    assert not torch.equal(torch.cat(list(batches)), torch.cat(first))
    assert not torch.equal(permutation(100, 1, 0), permutation(100, 2, 0))


def test_all_epochs_of_all_seeds_have_different_orders() -> None:
    orders = [permutation(30, seed, epoch) for seed in range(9) for epoch in range(9)]
    assert len({tuple(order.tolist()) for order in orders}) == 81


@pytest.mark.parametrize(("count", "side", "expected"), [(600, 8, 3), (600, 64, 10), (2, 600, 2)])
def test_evaluation_batches_have_about_equal_numbers_of_pixels(
    count: int, side: int, expected: int
) -> None:
    pixels = np.broadcast_to(np.uint8(0), (count, side, side, 3))
    images = Images(pixels, np.zeros(count, dtype=np.int64), ("a",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about read-only arrays
        assert len(build_evaluation_loader(Accelerator(cpu=True), images)) == expected


def test_evaluation_keeps_the_order_and_the_incomplete_batch() -> None:
    batches = list(GlobalBatches(23, 10, seed=None))
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert torch.equal(torch.cat(batches), torch.arange(23))


def test_micro_batches_have_the_samples_of_the_batch() -> None:
    whole = list(GlobalBatches(64, 16, seed=3))
    parts = list(GlobalBatches(64, 4, seed=3))
    for number, batch in enumerate(whole):
        assert torch.equal(batch, torch.cat(parts[4 * number : 4 * number + 4]))


def test_a_subset_is_gathered_from_the_whole_array() -> None:
    images = draw(50, 8, seed=(0,))
    subset = images.limited(20, seed=4)
    dataset = ImageDataset(subset, torch.device("cpu"))
    batch = dataset.__getitems__(torch.tensor([3, 0, 19]))
    rows = subset.selected[[3, 0, 19]]
    assert len(dataset) == 20
    assert batch.images.tolist() == images.images[rows].tolist()
    assert batch.labels.tolist() == images.labels[rows].tolist()
    assert batch.positions.tolist() == [3, 0, 19]


def test_micro_batches_without_a_complete_optimizer_step_are_dropped() -> None:
    sizes = {together: len(list(GlobalBatches(100, 16, 0, together))) for together in (1, 2, 4)}
    assert sizes == {1: 6, 2: 6, 4: 4}
