"""Augmentation: comparison with slow references, and random numbers as functions of the sample."""

import numpy as np
import pytest
import torch

from cifar_dist.config import AugmentConfig
from cifar_dist.data.augment import (
    augment,
    flip_and_shift,
    mix_integers,
    normalise,
    to_grey,
    uniform,
)
from cifar_dist.data.batches import Batch


def batch_of(count: int, size: int = 8, first: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, size, size, 3), generator=generator).to(torch.uint8)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(first, first + count))


def test_random_numbers_are_uniform_and_uncorrelated() -> None:
    positions = torch.arange(100_000)
    draws = {
        key: uniform(*key[:2], positions)[key[2]]
        for key in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1), (2**40, 0, 0)]
    }
    for values in draws.values():
        assert values.dtype == torch.float32
        assert values.min() >= 0
        assert values.max() < 1
        counts = torch.histc(values, bins=20, min=0, max=1)
        chi_square = ((counts - 5000) ** 2 / 5000).sum()
        assert chi_square < 43.8  # 99.9th percentile of chi-square with 19 degrees of freedom
        neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
        assert abs(neighbours) < 0.015
    correlations = torch.corrcoef(torch.stack(list(draws.values())))
    assert (correlations - torch.eye(len(draws))).abs().max() < 0.015


def test_random_numbers_do_not_depend_on_the_batch() -> None:
    whole = uniform(3, 2, torch.arange(64))
    parts = [uniform(3, 2, torch.arange(start, start + 16)) for start in range(0, 64, 16)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(whole[:, shuffled], uniform(3, 2, shuffled))


def test_mixed_integers_differ() -> None:
    seeds = {mix_integers(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("padding", ["reflect", "zero"])
def test_flip_and_shift_equals_padding_then_cropping(padding: str) -> None:
    reach, size = 3, 8
    batch = batch_of(200, size)
    generator = np.random.default_rng(0)
    flip = torch.from_numpy(generator.random(200) < 0.5)
    down, right = torch.from_numpy(generator.integers(-reach, reach + 1, (2, 200)))
    moved = flip_and_shift(batch.images, flip.long(), down, right, reach, padding)
    mode = {"reflect": "reflect", "zero": "constant"}[padding]
    for row in range(200):
        image = batch.images[row].numpy()
        if flip[row]:
            image = image[:, ::-1]
        padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode=mode)
        top, left = reach + int(down[row]), reach + int(right[row])
        assert np.array_equal(moved[row], padded[top : top + size, left : left + size])


def test_flips_alternate_between_epochs() -> None:
    batch, config = batch_of(400), AugmentConfig(flip="alternating")
    first, second, third = (augment(batch, config, 0, epoch)[0] for epoch in range(3))
    assert torch.equal(first.flip(2), second)
    assert torch.equal(first, third)
    mirrored = (first != batch.images).flatten(1).any(1).float().mean()
    assert 0.4 < mirrored < 0.6


def test_all_shifts_occur_and_change_with_epoch_and_seed() -> None:
    index = torch.arange(81, dtype=torch.uint8).reshape(1, 9, 9, 1).expand(500, 9, 9, 3)
    batch = Batch(index, torch.zeros(500), torch.arange(500))
    config = AugmentConfig(translate=2)
    centres = augment(batch, config, 0, 0)[0][:, 4, 4, 0]
    expected = {(4 + y) * 9 + 4 + x for y in range(-2, 3) for x in range(-2, 3)}
    assert set(centres.tolist()) == expected
    assert not torch.equal(centres, augment(batch, config, 0, 1)[0][:, 4, 4, 0])
    assert not torch.equal(centres, augment(batch, config, 1, 0)[0][:, 4, 4, 0])


def test_cutout_is_one_square_of_the_mean_colour() -> None:
    batch = batch_of(300, 16)
    images, hole = augment(batch, AugmentConfig(cutout=6), 0, 0)
    assert torch.equal(images, batch.images)
    assert hole is not None
    sizes = hole.flatten(1).sum(1)
    assert sizes.max() == 36
    assert sizes.min() >= 9  # at a corner a quarter of the square is inside
    rows, columns = hole.any(2).flatten(1), hole.any(1).flatten(1)
    assert (rows == columns).all(1).float().mean() < 0.2  # the axes are independent
    pixels = normalise(images, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), hole).permute(0, 2, 3, 1)
    assert torch.equal(pixels.eq(0).all(-1, keepdim=True), hole)


def test_grayscale_and_its_probability() -> None:
    batch = batch_of(1000)
    grey = to_grey(batch.images)
    reference = (batch.images.double() @ torch.tensor([0.299, 0.587, 0.114]).double()).round()
    assert (grey[..., 0].double() - reference).abs().max() <= 1
    images, _ = augment(batch, AugmentConfig(grayscale=0.25), 0, 0)
    changed = (images != batch.images).flatten(1).any(1)
    assert 0.2 < changed.float().mean() < 0.3
    assert torch.equal(images[changed], grey[changed])


def test_the_random_choices_for_an_image_are_independent() -> None:
    batch = batch_of(1000)
    config = AugmentConfig(flip="random", grayscale=0.5)
    images, _ = augment(batch, config, 0, 0)
    grey = (images == images[..., :1]).flatten(1).all(1)
    plain = torch.where(grey[:, None, None, None], to_grey(batch.images), batch.images)
    mirrored = (images != plain).flatten(1).any(1)
    for chosen in (grey & mirrored, grey & ~mirrored, ~grey & mirrored, ~grey & ~mirrored):
        assert 0.2 < chosen.float().mean() < 0.3


def test_without_augmentation_images_are_unchanged() -> None:
    batch = batch_of(5)
    images, hole = augment(batch, AugmentConfig(), 0, 0)
    assert torch.equal(images, batch.images)
    assert hole is None


def test_normalise_gives_channels_last_pixels() -> None:
    images = batch_of(2).images
    pixels = normalise(images, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    expected = (images.double() / 255 - torch.tensor([0.5, 0.25, 0.0])) / torch.tensor([0.5, 1, 2])
    torch.testing.assert_close(pixels.permute(0, 2, 3, 1).double(), expected, atol=1e-6, rtol=1e-5)
