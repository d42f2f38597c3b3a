"""A Triton kernel for augmentation and normalisation in one pass.

In torch they are dozens of short kernels, a sixth of a step. Draws, pixels and rounding are those
of `cifar_dist.data.augment`, to the bit.
"""

from functools import lru_cache

import torch
import triton
from triton import language as tl

from cifar_dist import speedups
from cifar_dist.config import AugmentConfig
from cifar_dist.data.augment import Pixels, Stream, mix_integers, per_channel, stream_keys
from cifar_dist.data.batches import Batch

PIXELS = 1024  # of a program
FIELDS = ("flip", "translate", "padding", "cutout", "grayscale")  # that the kernel implements


def implements(config: AugmentConfig) -> bool:
    """Return whether the kernel applies every augmentation that `config` asks for."""
    return config == type(config)(**{name: getattr(config, name) for name in FIELDS})


class FusedPixels(Pixels):
    """Pixels whose training batches are computed by the kernel on a GPU."""

    def for_training(self, batch: Batch, epoch: int) -> torch.Tensor:
        """Augment and normalise a training batch."""
        images, config = batch.images, self.augment
        if not speedups.usable(images):
            return super().for_training(batch, epoch)
        count, height, width, _ = images.shape
        outputs = torch.empty(images.shape, device=images.device)
        keys = _epoch_keys(self.seed, epoch, config.flip == "alternating", images.device)
        centre, scale = per_channel(tuple(self.mean), tuple(self.std), images.device)
        streams = stream_keys()
        _augment[(count, triton.cdiv(height * width, PIXELS))](
            *(images.contiguous(), batch.positions, keys, outputs, centre, scale),
            *(height, width, config.grayscale),
            flip_stream=streams[Stream.FLIP],
            x_stream=streams[Stream.SHIFT_X],
            y_stream=streams[Stream.SHIFT_Y],
            cutout_x_stream=streams[Stream.CUTOUT_X],
            cutout_y_stream=streams[Stream.CUTOUT_Y],
            grey_stream=streams[Stream.GRAYSCALE],
            FLIP=config.flip != "none",
            REACH=config.translate,
            REFLECT=config.padding == "reflect",
            GREY=config.grayscale > 0,
            CUTOUT=config.cutout,
            PIXELS=PIXELS,
        )
        return outputs.permute(0, 3, 1, 2)


@lru_cache(maxsize=4)
def _epoch_keys(seed: int, epoch: int, alternates: bool, device: torch.device) -> torch.Tensor:
    """Return what an epoch's draws depend on, int64 [5].

    The key of the draws and the key of the flips, each as its low and high 32 bits, and 1 if all
    flips are inverted in this epoch.
    """
    keys = [mix_integers(seed, epoch), mix_integers(seed, 0 if alternates else epoch)]
    halves = [half for key in keys for half in (key & 0xFFFFFFFF, key >> 32)]
    return torch.tensor([*halves, epoch % 2 if alternates else 0], device=device)


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]
    """Scramble 32-bit values kept in int64, as `cifar_dist.data.augment` does."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


@triton.jit
def _sample(position, low, high):  # type: ignore[no-untyped-def]
    return _mix(_mix((position & 0xFFFFFFFF) ^ low) ^ high)


@triton.jit
def _uniform(sample, stream):  # type: ignore[no-untyped-def]
    return (_mix(sample ^ stream) >> 8).to(tl.float32) / 16777216.0


@triton.jit
def _source(place, side, REACH: tl.constexpr, REFLECT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the row or column of the image that is shown at `place`, which may be outside."""
    if REFLECT:
        last = tl.maximum(side - 1, 1)
        place = (place + 2 * last * REACH) % (2 * last)
        place = last - tl.abs(place - last)
    return tl.minimum(tl.maximum(place, 0), side - 1)


@triton.jit
def _augment(  # type: ignore[no-untyped-def]
    images, positions, keys, outputs, centre, scale, height, width, grayscale,
    flip_stream: tl.constexpr, x_stream: tl.constexpr, y_stream: tl.constexpr,
    cutout_x_stream: tl.constexpr, cutout_y_stream: tl.constexpr, grey_stream: tl.constexpr,
    FLIP: tl.constexpr, REACH: tl.constexpr, REFLECT: tl.constexpr,
    GREY: tl.constexpr, CUTOUT: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = pixel < height * width
    row, column = pixel // width, pixel % width
    position = tl.load(positions + number)
    sample = _sample(position, tl.load(keys), tl.load(keys + 1))
    y, x = row, column
    if REACH > 0:
        y = row + (_uniform(sample, y_stream) * (2 * REACH + 1)).to(tl.int32) - REACH
        x = column + (_uniform(sample, x_stream) * (2 * REACH + 1)).to(tl.int32) - REACH
    seen = mask
    if not REFLECT:
        seen = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = _source(y, height, REACH, REFLECT), _source(x, width, REACH, REFLECT)
    if FLIP:
        draw = _uniform(_sample(position, tl.load(keys + 2), tl.load(keys + 3)), flip_stream)
        mirrored = (draw < 0.5) != (tl.load(keys + 4) != 0)
        x = tl.where(mirrored, width - 1 - x, x)
    first = images + ((number.to(tl.int64) * height + y) * width + x) * 3
    red = tl.load(first, mask=seen, other=0).to(tl.int32)
    green = tl.load(first + 1, mask=seen, other=0).to(tl.int32)
    blue = tl.load(first + 2, mask=seen, other=0).to(tl.int32)
    if GREY:
        luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
        chosen = _uniform(sample, grey_stream) < grayscale
        red = tl.where(chosen, luma, red)
        green = tl.where(chosen, luma, green)
        blue = tl.where(chosen, luma, blue)
    red = (red.to(tl.float32) - tl.load(centre)) * tl.load(scale)
    green = (green.to(tl.float32) - tl.load(centre + 1)) * tl.load(scale + 1)
    blue = (blue.to(tl.float32) - tl.load(centre + 2)) * tl.load(scale + 2)
    if CUTOUT > 0:
        top = (_uniform(sample, cutout_y_stream) * height).to(tl.int32) - CUTOUT // 2
        left = (_uniform(sample, cutout_x_stream) * width).to(tl.int32) - CUTOUT // 2
        cut = (row >= top) & (row < top + CUTOUT) & (column >= left) & (column < left + CUTOUT)
        red = tl.where(cut, 0.0, red)
        green = tl.where(cut, 0.0, green)
        blue = tl.where(cut, 0.0, blue)
    target = outputs + (number.to(tl.int64) * height * width + pixel) * 3
    tl.store(target, red, mask=mask)
    tl.store(target + 1, green, mask=mask)
    tl.store(target + 2, blue, mask=mask)
