"""Triton kernels for the operations of `speednet` besides its wide convolutions.

Between its convolutions `speednet` only moves numbers, and on a GPU that takes as long as the
convolutions: layer by layer, each operation reads and writes all features. Here training takes two
passes forward (pool and sum, then normalise and activate) and two backward. The gradient of a
pooled layer is written once, with its zeros. Unlike a compiled network these kernels are ready in
seconds.

All arithmetic within a pass is float32. Sums run over blocks in a fixed order, so results are
bit-identical each time.
"""

from typing import Any

import torch
import triton
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from triton import language as tl

from cifar_dist import speedups
from cifar_dist.models.speednet import Operations

CHANNELS = 64  # of a program's tile; 128 bytes of bfloat16, a cache line
ROWS = 32
LOOPS = 4  # tiles per program, in kernels without sums
PROGRAMS = 512  # that share the sums over all pixels
PADDED = 32  # channels of whitened images

# Kernels are not specialised on these arguments: that would compile them again for each kind of
# number, and they would run no faster. They do gain from channels being a multiple of 16.
SIZES = ["pixels", "patches", "windows", "height", "width", "rows", "columns", "stride"]
SIZES += ["loops", "programs", "share", "of_image", "of_color", "of_row", "of_column"]


class FusedOperations(Operations):
    """The same operations, in fused kernels where these apply."""

    @staticmethod
    def whiten(images: torch.Tensor, whitening: nn.Conv2d, activation: nn.Module) -> torch.Tensor:
        """Apply the first layer; on a GPU with PADDED channels, of which the last are zero."""
        differentiated = torch.is_grad_enabled() and (
            images.requires_grad or whitening.weight.requires_grad
        )
        if speedups.usable(images) and type(activation) is nn.GELU and not differentiated:
            return whiten_activate(images, whitening)
        return Operations.whiten(images, whitening, activation)

    @staticmethod
    def convolve(images: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
        """Apply a stage's convolution, also to images that `whiten` has padded."""
        added = images.shape[1] - convolution.in_channels
        if added:
            weight = functional.pad(convolution.weight, (0, 0, 0, 0, 0, added))
            return functional.conv2d(images, weight, padding=1)
        return Operations.convolve(images, convolution)

    @staticmethod
    def finish(
        features: torch.Tensor, normalisation: nn.Module, activation: nn.Module, pool: bool
    ) -> torch.Tensor:
        """Apply what follows a convolution."""
        if (
            speedups.usable(features)
            and type(normalisation) is nn.BatchNorm2d  # the kernels do not synchronise it
            and type(activation) is nn.GELU
            # With running statistics the kernel has no gradient.
            and (normalisation.training or not torch.is_grad_enabled())
        ):
            return pool_normalise_activate(features, normalisation, pool)
        return Operations.finish(features, normalisation, activation, pool)


def pool_normalise_activate(
    features: torch.Tensor, normalisation: nn.BatchNorm2d, pool: bool
) -> torch.Tensor:
    """Return gelu(normalisation(features)), of 2x2 max-pooled features if `pool`.

    Equal to the three layers in turn, and updates the running statistics when training. In
    evaluation the result has no gradient.

    Args:
        features: [N, C, H, W] on a GPU. Copied unless they are channels-last.
        normalisation: with running statistics.
    """
    features = features.contiguous(memory_format=torch.channels_last)
    if normalisation.training:
        assert normalisation.num_batches_tracked is not None
        normalisation.num_batches_tracked.add_(1)
        return _Fused.apply(features, normalisation.weight, normalisation.bias, normalisation, pool)
    assert normalisation.running_mean is not None
    return _normalise_activate(
        features, normalisation.running_mean, normalisation.running_var, normalisation, pool
    )


def whiten_activate(images: torch.Tensor, whitening: nn.Conv2d) -> torch.Tensor:
    """Return gelu(whitening(images)) without gradients, in autocast's dtype if it is enabled.

    Libraries are slow at a convolution of three channels, and at one of 24. The outputs have
    PADDED channels, the last of them zero, which halves the time of the next convolution.

    Args:
        images: float [N, 3, H, W] on a GPU.
        whitening: of 2x2 patches of three channels, with at most PADDED filters and a bias.
    """
    filters, bias, stride = whitening.weight, whitening.bias, whitening.stride[0]
    device = images.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    number, _, height, width = images.shape
    rows, columns = (height - 2) // stride + 1, (width - 2) // stride + 1
    outputs = _empty(images, PADDED, rows, columns, kind)
    patches = number * rows * columns
    _whiten[(triton.cdiv(patches, 128),)](
        *(images, filters, bias, outputs, patches, rows, columns, stride, len(filters)),
        *(*images.stride(), *filters.stride()),
        ROWS=128,
        CHANNELS=PADDED,
    )
    return outputs


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        normalisation: nn.BatchNorm2d,
        pool: bool,
    ) -> torch.Tensor:
        channels, height, width = features.shape[1:]
        pooled, chosen = features, None
        if pool:
            pooled = _empty(features, channels, height // 2, width // 2)
            chosen = torch.empty_like(pooled, dtype=torch.uint8)
        pixels = pooled.numel() // channels
        loops, programs = _shares(pixels, channels)
        parts = features.new_empty((2, programs, channels), dtype=torch.float32)
        _pool_and_sum[(programs, triton.cdiv(channels, CHANNELS))](
            *(features, pooled, chosen, parts[0], parts[1], pixels, channels, loops),
            *(height, width, height // 2, width // 2),
            POOL=pool,
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )
        mean, variance = features.new_empty((2, channels), dtype=torch.float32)
        _finish_statistics[(triton.cdiv(channels, 16),)](
            *(parts[0], parts[1], mean, variance),
            *(normalisation.running_mean, normalisation.running_var, normalisation.momentum),
            *(pixels, programs, loops * ROWS, channels),
            PROGRAMS=64,
            CHANNELS=16,
        )
        ctx.save_for_backward(pooled, chosen, mean, variance, weight, bias)
        ctx.eps, ctx.shape = normalisation.eps, features.shape
        return _normalise_activate(pooled, mean, variance, normalisation, pool=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pooled, chosen, mean, variance, weight, bias = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        number, channels, height, width = ctx.shape
        pixels = pooled.numel() // channels
        loops, programs = _shares(pixels, channels)
        blocks = triton.cdiv(channels, CHANNELS)
        layer = (mean, variance, weight, bias, ctx.eps)
        parts = gradient.new_empty((2, programs, channels), dtype=torch.float32)
        _sum_gradients[(programs, blocks)](
            *(gradient, pooled, *layer, parts[0], parts[1], pixels, channels, loops),
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )
        of_bias, of_weight = parts.sum(dim=1)
        of_features = _empty(pooled, channels, height, width)
        pool = chosen is not None
        # If a side is odd, its last pixels belong to no window and get zeros.
        rows, columns = (-(-height // 2), -(-width // 2)) if pool else (height, width)
        windows = number * rows * columns
        _pass_back[(triton.cdiv(windows, LOOPS * ROWS), blocks)](
            *(gradient, pooled, chosen, *layer, of_bias, of_weight, of_features),
            *(windows, pixels, channels, height, width, rows, columns),
            POOL=pool,
            LOOPS=LOOPS,
            ROWS=ROWS,
            CHANNELS=CHANNELS,
        )
        return of_features, of_weight, of_bias, None, None


def _normalise_activate(
    features: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor | None,
    normalisation: nn.BatchNorm2d,
    pool: bool,
) -> torch.Tensor:
    channels, height, width = features.shape[1:]
    outputs = (
        _empty(features, channels, height // 2, width // 2) if pool else torch.empty_like(features)
    )
    pixels = outputs.numel() // channels
    _normalise[(triton.cdiv(pixels, LOOPS * ROWS), triton.cdiv(channels, CHANNELS))](
        *(features, mean, variance, normalisation.weight, normalisation.bias, normalisation.eps),
        *(outputs, pixels, channels, height, width, height // 2, width // 2),
        POOL=pool,
        LOOPS=LOOPS,
        ROWS=ROWS,
        CHANNELS=CHANNELS,
    )
    return outputs


def _empty(
    like: torch.Tensor, channels: int, height: int, width: int, kind: torch.dtype | None = None
) -> torch.Tensor:
    return torch.empty(
        (len(like), channels, height, width),
        dtype=kind or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _shares(pixels: int, channels: int) -> tuple[int, int]:
    """Return the number of tiles that a program sums, and the number of programs."""
    programs = max(1, PROGRAMS // triton.cdiv(channels, CHANNELS))
    loops = triton.cdiv(pixels, programs * ROWS)
    return loops, triton.cdiv(pixels, loops * ROWS)


@triton.jit
def _normal(z):  # type: ignore[no-untyped-def]
    """Return the normal distribution's cumulative function and its density.

    Both from one exponential, within 1e-7 (Abramowitz and Stegun, 1964, 7.1.26), and using rsqrt,
    since GPUs have no fast division: otherwise arithmetic would limit these kernels, not memory.
    """
    power = tl.exp2(z * z * -0.7213475204444817)
    t = 1.0 + 0.23164189 * tl.abs(z)
    t = tl.rsqrt(t * t)
    series = -0.72657601 + t * 0.53070271
    series = 0.127414796 + t * (-0.142248368 + t * (0.71070687 + t * series))
    tail = t * series * power
    return tl.where(z < 0, tail, 1 - tail), 0.3989422804014327 * power


@triton.jit
def _gelu(z):  # type: ignore[no-untyped-def]
    cumulative, _ = _normal(z)
    return z * cumulative


@triton.jit
def _slope_of_gelu(z):  # type: ignore[no-untyped-def]
    cumulative, density = _normal(z)
    return cumulative + z * density


@triton.jit
def _corner(pixel, height, width, rows, columns, channels):  # type: ignore[no-untyped-def]
    """Return the offset in the features at which the window of a pooled pixel begins."""
    image, place = pixel // (rows * columns), pixel % (rows * columns)
    row, column = 2 * (place // columns), 2 * (place % columns)
    return ((image.to(tl.int64) * height + row) * width + column) * channels


@triton.jit
def _largest(features, first, width, channels, mask):  # type: ignore[no-untyped-def]
    """Return the largest value of each 2x2 window and its index: NaN if any is, else the first."""
    best = tl.load(features + first, mask=mask, other=0.0).to(tl.float32)
    chosen = tl.zeros_like(best).to(tl.uint8)
    for place in tl.static_range(1, 4):
        offset = (place // 2 * width + place % 2) * channels
        value = tl.load(features + first + offset, mask=mask, other=0.0).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        chosen = tl.where(better, place, chosen).to(tl.uint8)
    return best, chosen


@triton.jit(do_not_specialize=SIZES)
def _pool_and_sum(  # type: ignore[no-untyped-def]
    features, pooled, chosen, means, squares, pixels, channels, loops,
    height, width, rows, columns,
    POOL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pool, and write each program's mean and sum of squared deviations of each channel.

    Deviations are from one of the program's own values, so that their squares do not cancel.
    """
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    start = tl.program_id(0) * loops * ROWS
    seen = start.to(tl.int64) * channels
    if POOL:
        seen = _corner(start, height, width, rows, columns, channels)
    origin = tl.load(features + seen + channel, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    square = tl.zeros([ROWS, CHANNELS], tl.float32)
    for loop in range(loops):
        pixel = start + loop * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        if POOL:
            corner = _corner(pixel, height, width, rows, columns, channels)
            value, place = _largest(
                features, corner[:, None] + channel[None, :], width, channels, mask
            )
            tl.store(pooled + at, value, mask=mask)
            tl.store(chosen + at, place, mask=mask)
            value = value.to(pooled.dtype.element_ty).to(tl.float32)
        else:
            value = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
        deviation = tl.where(mask, value - origin[None, :], 0.0)
        total += deviation
        square += deviation * deviation
    count = tl.minimum(pixels - start, loops * ROWS).to(tl.float32)
    of_all = tl.sum(total, axis=0)
    change = of_all / count
    at = tl.program_id(0) * channels + channel
    tl.store(means + at, origin + change, mask=inside)
    tl.store(squares + at, tl.sum(square, axis=0) - of_all * change, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _finish_statistics(  # type: ignore[no-untyped-def]
    means, squares, mean_of_all, variance_of_all, running_mean, running_variance, momentum,
    pixels, programs, share, channels,
    PROGRAMS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Combine the programs' sums and update the running statistics."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    mean = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        mask = (program < programs)[:, None] & inside[None, :]
        at = program[:, None] * channels + channel[None, :]
        count = tl.minimum(share, pixels - program * share).to(tl.float32)
        part = tl.load(means + at, mask=mask, other=0.0)
        mean += tl.sum(count[:, None] * part, axis=0)
    mean = mean / pixels
    square = tl.zeros([CHANNELS], tl.float32)
    for first in range(0, programs, PROGRAMS):
        program = first + tl.arange(0, PROGRAMS)
        mask = (program < programs)[:, None] & inside[None, :]
        at = program[:, None] * channels + channel[None, :]
        count = tl.minimum(share, pixels - program * share).to(tl.float32)
        change = tl.load(means + at, mask=mask, other=0.0) - mean[None, :]
        part = tl.load(squares + at, mask=mask, other=0.0)
        square += tl.sum(tl.where(mask, part + count[:, None] * change * change, 0.0), axis=0)
    tl.store(mean_of_all + channel, mean, mask=inside)
    tl.store(variance_of_all + channel, square / pixels, mask=inside)
    before = tl.load(running_mean + channel, mask=inside)
    tl.store(running_mean + channel, before + momentum * (mean - before), mask=inside)
    before = tl.load(running_variance + channel, mask=inside)
    unbiased = square / tl.maximum(pixels - 1, 1)
    tl.store(running_variance + channel, before + momentum * (unbiased - before), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _normalise(  # type: ignore[no-untyped-def]
    features, mean, variance, weight, bias, eps,
    outputs, pixels, channels, height, width, rows, columns,
    POOL: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pool if POOL, normalise with the given statistics, and activate."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    centre = tl.load(mean + channel, mask=inside)
    scale = tl.rsqrt(tl.load(variance + channel, mask=inside) + eps)
    scale *= tl.load(weight + channel, mask=inside)
    shift = tl.load(bias + channel, mask=inside)
    for loop in range(LOOPS):
        pixel = (tl.program_id(0) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        if POOL:
            corner = _corner(pixel, height, width, rows, columns, channels)
            value, _ = _largest(features, corner[:, None] + channel[None, :], width, channels, mask)
        else:
            value = tl.load(features + at, mask=mask, other=0.0).to(tl.float32)
        z = (value - centre[None, :]) * scale[None, :] + shift[None, :]
        tl.store(outputs + at, _gelu(z), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _sum_gradients(  # type: ignore[no-untyped-def]
    gradients, pooled, mean, variance, weight, bias, eps,
    sums, products, pixels, channels, loops,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write each program's sums of the gradients before the activation, and of those times x."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    centre = tl.load(mean + channel, mask=inside)
    scale = tl.rsqrt(tl.load(variance + channel, mask=inside) + eps)
    gain = scale * tl.load(weight + channel, mask=inside)
    shift = tl.load(bias + channel, mask=inside)
    of_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    of_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    for loop in range(loops):
        pixel = (tl.program_id(0) * loops + loop) * ROWS + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & inside[None, :]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(pooled + at, mask=mask, other=0.0).to(tl.float32) - centre[None, :]
        # Masked gradients are zero, and add nothing.
        gradient = tl.load(gradients + at, mask=mask, other=0.0).to(tl.float32)
        gradient = gradient * _slope_of_gelu(value * gain[None, :] + shift[None, :])
        of_bias += gradient
        of_weight += gradient * value
    at = tl.program_id(0) * channels + channel
    tl.store(sums + at, tl.sum(of_bias, axis=0), mask=inside)
    tl.store(products + at, tl.sum(of_weight, axis=0) * scale, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _pass_back(  # type: ignore[no-untyped-def]
    gradients, pooled, chosen, mean, variance, weight, bias, eps, of_bias, of_weight, of_features,
    windows, pixels, channels, height, width, rows, columns,
    POOL: tl.constexpr, LOOPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the features, at all pixels of each window."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    centre = tl.load(mean + channel, mask=inside)
    scale = tl.rsqrt(tl.load(variance + channel, mask=inside) + eps)
    gain = scale * tl.load(weight + channel, mask=inside)
    shift = tl.load(bias + channel, mask=inside)
    average = gain * (tl.load(of_bias + channel, mask=inside) / pixels)
    slope = gain * scale * (tl.load(of_weight + channel, mask=inside) / pixels)
    for loop in range(LOOPS):
        window = (tl.program_id(0) * LOOPS + loop) * ROWS + tl.arange(0, ROWS)
        full = (window < windows)[:, None] & inside[None, :]
        mask, pixel = full, window
        if POOL:
            image, place = window // (rows * columns), window % (rows * columns)
            row, column = place // columns, place % columns
            pixel = (image * (height // 2) + row) * (width // 2) + column
            mask = full & ((row < height // 2) & (column < width // 2))[:, None]
        at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(pooled + at, mask=mask, other=0.0).to(tl.float32) - centre[None, :]
        gradient = tl.load(gradients + at, mask=mask, other=0.0).to(tl.float32)
        gradient = gradient * _slope_of_gelu(value * gain[None, :] + shift[None, :])
        result = gain[None, :] * gradient - average[None, :] - value * slope[None, :]
        if POOL:
            result = tl.where(mask, result, 0.0)
            which = tl.load(chosen + at, mask=mask, other=0)
            corner = _corner(window, height, width, rows, columns, channels)
            first = corner[:, None] + channel[None, :]
            for place in tl.static_range(4):
                down, right = place // 2, place % 2
                exists = (2 * row + down < height) & (2 * column + right < width)
                offset = (down * width + right) * channels
                there = tl.where(which == place, result, 0.0)
                tl.store(of_features + first + offset, there, mask=full & exists[:, None])
        else:
            tl.store(of_features + at, result, mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["images"])
def _whiten(  # type: ignore[no-untyped-def]
    images, filters, bias, outputs, patches, rows, columns, stride, channels,
    of_image, of_color, of_row, of_column, of_filter, of_color_there, of_row_there, of_column_there,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Multiply each 2x2 patch with all filters, add their biases and activate."""
    patch = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    real = patch < patches
    image, place = patch // (rows * columns), patch % (rows * columns)
    row, column = place // columns * stride, place % columns * stride
    first = image.to(tl.int64) * of_image + row * of_row + column * of_column
    tap = tl.arange(0, 16)  # 12 and 4 empty ones: tensor cores need 16
    color, down, right = tap % 3, tap // 3 // 2, tap // 3 % 2
    offset = color * of_color + down * of_row + right * of_column
    mask = real[:, None] & (tap < 12)[None, :]
    values = tl.load(images + first[:, None] + offset[None, :], mask=mask, other=0.0)
    offset = color * of_color_there + down * of_row_there + right * of_column_there
    mask = (tap < 12)[:, None] & (channel < channels)[None, :]
    at = offset[:, None] + channel[None, :] * of_filter
    weights = tl.load(filters + at, mask=mask, other=0.0)
    # As exact as cuDNN's convolution of float32, which uses TF32 too.
    sums = tl.dot(values.to(tl.float32), weights.to(tl.float32), input_precision="tf32")
    sums += tl.load(bias + channel, mask=channel < channels, other=0.0)[None, :]
    at = patch.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    tl.store(outputs + at, _gelu(sums), mask=real[:, None])
