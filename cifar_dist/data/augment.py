"""Augmentation: pure functions on batches, the same whatever the process, worker or restart.

Every random draw is a hash of (seed, epoch, position of the sample, purpose). Nothing is drawn from
a generator whose state would have to be saved or kept equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cifar_dist.config import AugmentConfig
from cifar_dist.data.batches import Batch


@dataclass(frozen=True)
class Pixels:
    """How batches of pixels become the input of the network, float32 [N, 3, H, W].

    Attributes:
        mean, std: per channel, on the scale of [0, 1].
        augment: random changes in training.
        seed: of those changes.
    """

    mean: Sequence[float]
    std: Sequence[float]
    augment: AugmentConfig
    seed: int

    def for_training(self, batch: Batch, epoch: int) -> torch.Tensor:
        """Augment and normalise a training batch."""
        images, hole = augment(batch, self.augment, self.seed, epoch)
        return normalise(images, self.mean, self.std, hole)

    def for_evaluation(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images, uint8 [N, H, W, 3]."""
        return normalise(images, self.mean, self.std)


# What a draw is for; each purpose has a stream of its own.
FLIP, SHIFT_X, SHIFT_Y, CUTOUT_X, CUTOUT_Y, GRAYSCALE = range(6)


def augment(
    batch: Batch, config: AugmentConfig, seed: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return changed images, uint8 [N, H, W, 3], and where they are cut out, bool [N, H, W, 1].

    The second is None where nothing is cut out. Cut-out pixels become the mean colour, hence zero
    once normalised (DeVries and Taylor, 2017); `normalise` sets them.
    """
    images = batch.images
    count, height, width, _ = images.shape

    def draw(purpose: int, epoch: int = epoch) -> torch.Tensor:
        return uniform(seed, epoch, batch.positions, purpose)

    flip = torch.zeros(count, dtype=torch.bool, device=images.device)
    if config.flip == "random":
        flip = draw(FLIP) < 0.5
    elif config.flip == "alternating":  # Jordan, 2024: every image is seen both ways in two epochs
        flip = (draw(FLIP, epoch=0) < 0.5) ^ (epoch % 2 == 1)
    if config.flip != "none" or config.translate:
        reach = 2 * config.translate + 1
        shift_y, shift_x = (
            (draw(purpose) * reach).long() - config.translate for purpose in (SHIFT_Y, SHIFT_X)
        )
        images = flip_and_shift(images, flip, shift_y, shift_x, config.padding)
    if config.grayscale:
        chosen = (draw(GRAYSCALE) < config.grayscale)[:, None, None, None]
        images = torch.where(chosen, to_grey(images), images)
    hole = None
    if config.cutout:
        hole = _inside(draw(CUTOUT_Y), height, config.cutout)[:, :, None, None]
        hole = hole & _inside(draw(CUTOUT_X), width, config.cutout)[:, None, :, None]
    return images, hole


def normalise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    hole: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn uint8 [N, H, W, 3] into float32 [N, 3, H, W] with channels-last strides.

    Args:
        images: pixels from 0 to 255.
        mean, std: per channel, on the scale of [0, 1].
        hole: bool, broadcastable to [N, H, W, 1]: pixels to set to the mean.
    """
    centre = torch.tensor(mean, device=images.device) * 255
    scale = 1 / (torch.tensor(std, device=images.device) * 255)
    pixels = (images.float() - centre) * scale
    if hole is not None:
        pixels = pixels.masked_fill(hole, 0)
    return pixels.permute(0, 3, 1, 2)


def flip_and_shift(
    images: torch.Tensor,
    flip: torch.Tensor,
    shift_y: torch.Tensor,
    shift_x: torch.Tensor,
    padding: str,
) -> torch.Tensor:
    """Mirror and move each image in one gather.

    Args:
        images: uint8 [N, H, W, 3].
        flip: bool [N], which ones to mirror left to right.
        shift_y, shift_x: int64 [N], pixels by which the window moves over the image.
        padding: reflect or zero, for what lies outside the image.
    """
    count, height, width, _ = images.shape
    rows, row_outside = _window(height, shift_y, padding)
    columns, column_outside = _window(width, shift_x, padding)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    pixels = rows[:, :, None] * width + columns[:, None, :]
    moved = images.reshape(count, height * width, 3)[
        torch.arange(count, device=images.device)[:, None], pixels.reshape(count, -1)
    ].view_as(images)
    if padding == "zero":
        outside = row_outside[:, :, None, None] | column_outside[:, None, :, None]
        moved = moved.masked_fill(outside, 0)
    return moved


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Replace uint8 [N, H, W, 3] by its luma (ITU-R BT.601) in all three channels."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)
    luma = (images.float() * weights).sum(-1, keepdim=True).round()
    return luma.to(torch.uint8).expand_as(images)


def uniform(seed: int, epoch: int, positions: torch.Tensor, purpose: int) -> torch.Tensor:
    """Hash to float32 [N] in [0, 1): one number per (seed, epoch, position, purpose).

    Args:
        positions: int64 [N].
    """
    key = mix_integers(seed, epoch, purpose)
    bits = _mix((positions & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF))
    bits = _mix(bits ^ (key >> 32))
    return (bits >> 8).float() / (1 << 24)


def mix_integers(*values: int) -> int:
    """Hash integers to one of 63 bits: a seed that differs wherever any of them does."""
    state = 0x9E3779B97F4A7C15
    for value in values:  # the finaliser of splitmix64 (Steele, Lea and Flood, 2014)
        state = (state ^ value) * 0xBF58476D1CE4E5B9 % (1 << 64)
        state = (state ^ state >> 27) * 0x94D049BB133111EB % (1 << 64)
        state ^= state >> 31
    return state >> 1


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values kept in int64: the finaliser of MurmurHash3 (Appleby, 2011).

    Products overflow 64 bits, but their low 32 bits, which are kept, are exact on every device.
    """
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def _window(side: int, shift: torch.Tensor, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where pixels of a shifted axis come from, int64 [N, side], and which from outside."""
    source = torch.arange(side, device=shift.device) + shift[:, None]
    outside = (source < 0) | (source >= side)
    if padding == "reflect":
        last = max(side - 1, 1)
        source = last - (source % (2 * last) - last).abs()
    return source.clamp(0, side - 1), outside


def _inside(draw: torch.Tensor, side: int, length: int) -> torch.Tensor:
    """Mark `length` pixels around a drawn centre of an axis; bool [N, side]."""
    start = (draw * side).long() - length // 2
    axis = torch.arange(side, device=draw.device)
    return (axis >= start[:, None]) & (axis < start[:, None] + length)
