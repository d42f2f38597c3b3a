"""Augmentation: pure functions on batches, independent of rank, worker and restart.

Every random draw is a hash of (seed, epoch, position of the sample, purpose). There is no generator
whose state would have to be saved or kept equal on all ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import torch

from cifar_dist.config import AugmentConfig
from cifar_dist.data.batches import Batch


@dataclass(frozen=True)
class Pixels:
    """Turns batches of pixels into inputs of the network, float32 [N, 3, H, W].

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
        images, cutout = augment(batch, self.augment, self.seed, epoch)
        return normalise(images, self.mean, self.std, cutout)

    def for_evaluation(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise images, uint8 [N, H, W, 3]."""
        return normalise(images, self.mean, self.std)


class Stream(IntEnum):
    """A stream of random numbers, one for each purpose. Add new ones at the end."""

    FLIP = 0
    SHIFT_X = 1
    SHIFT_Y = 2
    CUTOUT_X = 3
    CUTOUT_Y = 4
    GRAYSCALE = 5


def augment(
    batch: Batch, config: AugmentConfig, seed: int, epoch: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return augmented images, uint8 [N, H, W, 3], and the cutout mask, bool [N, H, W, 1] or None.

    `normalise` sets the pixels under the mask to the mean colour, hence to zero (DeVries and
    Taylor, 2017).
    """
    images = batch.images
    count, height, width, _ = images.shape
    if config == AugmentConfig(padding=config.padding):
        return images, None
    draws = uniform(seed, epoch, batch.positions)
    if config.flip != "none" or config.translate:
        shift_y = shift_x = flip = torch.zeros(count, dtype=torch.long, device=images.device)
        if config.flip == "alternating":  # Jordan, 2024: every image both ways in two epochs
            flip = (uniform(seed, 0, batch.positions)[Stream.FLIP] < 0.5).long()
            flip = 1 - flip if epoch % 2 else flip
        elif config.flip == "random":
            flip = (draws[Stream.FLIP] < 0.5).long()
        if config.translate:
            places = (
                draws[Stream.SHIFT_X : Stream.SHIFT_Y + 1] * (2 * config.translate + 1)
            ).long()
            shift_x, shift_y = places - config.translate
        images = flip_and_shift(images, flip, shift_y, shift_x, config.translate, config.padding)
    if config.grayscale:
        chosen = (draws[Stream.GRAYSCALE] < config.grayscale)[:, None, None, None]
        images = torch.where(chosen, to_grey(images), images)
    cutout = None
    if config.cutout:
        cutout = _inside(draws[Stream.CUTOUT_Y], height, config.cutout)[:, :, None, None]
        cutout = cutout & _inside(draws[Stream.CUTOUT_X], width, config.cutout)[:, None, :, None]
    return images, cutout


def normalise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    cutout: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turn uint8 [N, H, W, 3] into float32 [N, 3, H, W] with channels-last strides.

    Args:
        images: pixels from 0 to 255.
        mean, std: per channel, on the scale of [0, 1].
        cutout: bool [N, H, W, 1]: pixels to set to the mean.
    """
    centre, scale = _per_pixel(tuple(mean), tuple(std), *images.shape[1:3], images.device)
    pixels = images.float().sub_(centre).mul_(scale)
    if cutout is not None:
        pixels.masked_fill_(cutout, 0)
    return pixels.permute(0, 3, 1, 2)


def flip_and_shift(
    images: torch.Tensor,
    flip: torch.Tensor,
    shift_y: torch.Tensor,
    shift_x: torch.Tensor,
    reach: int,
    padding: str,
) -> torch.Tensor:
    """Flip and shift each image by one gather of rows and one of pixels within rows.

    Args:
        images: uint8 [N, H, W, 3].
        flip: int64 [N], 1 for images to flip left to right, else 0.
        shift_y, shift_x: int64 [N], pixels by which the window moves over the image.
        reach: the largest shift, in pixels.
        padding: reflect or zero, for pixels outside the image.
    """
    count, height, width, channels = images.shape
    row_table, row_inside = _windows(height, 1, reach, padding, images.device)
    column_table, column_inside = _windows(width, channels, reach, padding, images.device)
    which_row, which_column = shift_y + reach, (shift_x + reach) + flip * (2 * reach + 1)
    first = torch.arange(0, count * height, height, device=images.device)
    rows = row_table.index_select(0, which_row) + first[:, None]
    columns = column_table.index_select(0, which_column)[:, None]
    lines = images.reshape(count * height, width * channels).index_select(0, rows.flatten())
    lines = lines.view(count, height, -1)
    moved = lines.gather(2, columns.expand(-1, height, -1))
    if padding == "zero" and reach:
        moved *= row_inside.index_select(0, which_row)[:, :, None]
        moved *= column_inside.index_select(0, which_column)[:, None]
    return moved.view_as(images)


def to_grey(images: torch.Tensor) -> torch.Tensor:
    """Replace uint8 [N, H, W, 3] by its luma (ITU-R BT.601) in all three channels.

    In integers, so that every device rounds alike.
    """
    red, green, blue = images.int().unbind(-1)
    luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
    return luma.to(torch.uint8)[..., None].expand_as(images)


def uniform(seed: int, epoch: int, positions: torch.Tensor) -> torch.Tensor:
    """Hash (seed, epoch, position, stream) to float32 [streams, N] in [0, 1).

    Args:
        positions: int64 [N].
    """
    key = mix_integers(seed, epoch)
    bits = _mix((positions & 0xFFFFFFFF) ^ (key & 0xFFFFFFFF))
    bits = _mix(bits ^ (key >> 32))
    bits = _mix(bits ^ _stream_keys(positions.device))
    return (bits >> 8).float() / (1 << 24)


def mix_integers(*values: int) -> int:
    """Hash integers to one of 63 bits, such as a seed that depends on all of them."""
    state = 0x9E3779B97F4A7C15
    for value in values:  # the finaliser of splitmix64 (Steele, Lea and Flood, 2014)
        state = (state ^ value) * 0xBF58476D1CE4E5B9 % (1 << 64)
        state = (state ^ state >> 27) * 0x94D049BB133111EB % (1 << 64)
        state ^= state >> 31
    return state >> 1


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values kept in int64: the finaliser of MurmurHash3 (Appleby, 2011).

    Products overflow 64 bits, but only their low 32 bits are kept, which are exact on any device.
    """
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


@lru_cache
def stream_keys() -> tuple[int, ...]:
    """Return the key of each stream of random numbers."""
    return tuple(mix_integers(stream) & 0xFFFFFFFF for stream in Stream)


# Constants are copied to a device once: a copy at each step would make the host wait for a GPU.


@lru_cache
def _stream_keys(device: torch.device) -> torch.Tensor:
    """Return the key of each stream, int64 [streams, 1]."""
    return torch.tensor(stream_keys(), device=device)[:, None]


@lru_cache
def per_channel(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what to subtract from pixels from 0 to 255 and to multiply by, each float32 [3]."""
    return torch.tensor(mean, device=device) * 255, 1 / (torch.tensor(std, device=device) * 255)


@lru_cache
def _per_pixel(
    mean: tuple[float, ...], std: tuple[float, ...], height: int, width: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same as float32 [H, W, 3]: broadcasting takes several times as long."""
    centre, scale = per_channel(mean, std, device)
    shape = (height, width, 3)
    return centre.expand(shape).contiguous(), scale.expand(shape).contiguous()


@lru_cache
def _windows(
    side: int, channels: int, reach: int, padding: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the source of each value along an axis, for each shift, first plain, then flipped.

    Returns:
        Indices, int64 [2 (2 reach + 1), side * channels], and 1 for those inside the image, uint8.
    """
    source = torch.arange(side) + torch.arange(-reach, reach + 1)[:, None]
    inside = (source >= 0) & (source < side)
    if padding == "reflect":
        last = max(side - 1, 1)
        source = last - (source % (2 * last) - last).abs()
    source = source.clamp(0, side - 1)
    source = torch.cat([source, side - 1 - source])[..., None] * channels + torch.arange(channels)
    inside = inside.repeat(2, 1).repeat_interleave(channels, dim=1)
    return source.flatten(1).to(device), inside.to(device, torch.uint8)


def _inside(draw: torch.Tensor, side: int, length: int) -> torch.Tensor:
    """Return a mask of `length` pixels around a drawn centre of an axis, bool [N, side]."""
    start = (draw * side).long() - length // 2
    axis = torch.arange(side, device=draw.device)
    return (axis >= start[:, None]) & (axis < start[:, None] + length)
