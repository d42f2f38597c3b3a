"""5x5 convolutions in three tenths of the multiplications, for a CPU.

Toom and Cook's minimal filtering F(8, 5) along the rows: a tile of 12 inputs is multiplied point by
point with a filter's 12 values at as many points, and gives 8 outputs, which by definition take 40
products. Down the columns the definition stays, so between the transforms stands one convolution of
5x1, its points being its groups. In both directions the transforms would cost what they save with
the few channels that 5x5 convolutions have. Results differ by about 6e-6 of their size.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE = 8  # outputs of a tile
# With infinity, where the values are the highest coefficients. The second one has to be 1.
POINTS = numpy.array([0, 1, -1, 5 / 2, -5 / 2, 2 / 5, -2 / 5, 3 / 2, -3 / 2, 2 / 3, -2 / 3])
CACHED = 400_000  # values at all points of so many images as are taken at once; measured


def pays(width: int) -> bool:
    """Whether images of this width are not mostly padding, and not worth windows of their own."""
    return -(-width // TILE) * TILE <= min(32, 3 * width // 2)


class Matrices(NamedTuple):
    """The transforms of rows of some width, in float32; tiles one after another, points in them."""

    inputs: torch.Tensor  # [tiles * points, width]
    filters: torch.Tensor  # [points, taps]
    outputs: torch.Tensor  # [width, tiles * points]


@cache
def matrices(width: int, taps: int = 5) -> Matrices:
    """Return the transforms of a filtering of `width` pixels with half the taps as border."""
    points = len(POINTS) + 1
    tiles = -(-width // TILE)
    filters, inputs = numpy.zeros((points, taps)), numpy.zeros((points, points))
    outputs = numpy.zeros((TILE, points))
    for number, point in enumerate(POINTS):
        others = numpy.delete(POINTS, number)
        filters[number] = point ** numpy.arange(taps) / numpy.prod(point - others)
        inputs[number, :-1] = numpy.poly(others)[::-1]
        outputs[:, number] = point ** numpy.arange(TILE)
    filters[-1, -1] = outputs[-1, -1] = 1
    inputs[-1] = numpy.poly(POINTS)[::-1]

    placed = numpy.zeros((tiles, points, tiles * TILE + taps - 1))
    for tile in range(tiles):
        placed[tile, :, tile * TILE : tile * TILE + points] = inputs
    within = placed[:, :, taps // 2 : taps // 2 + width].reshape(tiles * points, width)
    apart = numpy.kron(numpy.eye(tiles), outputs)[:width]
    return Matrices(*(torch.tensor(each, dtype=torch.float32) for each in (within, filters, apart)))


class Convolution(torch.autograd.Function):
    """A convolution of 5x5, stride 1 and padding 2: `apply(images, weight, bias or None)`."""

    # Values at the points are [N * tiles, points * channels, 1, height], channels last in memory.

    @staticmethod
    def forward(
        ctx: Any, images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        number, _, height, width = images.shape
        channels, inputs, taps, _ = weight.shape
        transforms = matrices(width, taps)
        points = len(transforms.filters)
        of_filter = transforms.filters @ weight.permute(3, 0, 2, 1).reshape(taps, -1)
        filters = of_filter.view(points * channels, 1, taps, inputs).permute(0, 3, 1, 2)
        # What is added to the value at 1 is added to each output of the tile.
        biases = None if bias is None else _at_one(points)[:, None].mul(bias).flatten()
        per_image = height * len(transforms.inputs) * max(inputs, channels)
        ctx.images = max(1, CACHED // per_image)
        rows = images.permute(0, 2, 3, 1)
        # Not a view, so that an activation may overwrite it.
        outputs = torch.empty((number, channels, height, width), memory_format=torch.channels_last)
        targets = outputs.permute(0, 2, 3, 1).split(ctx.images)
        values = []
        for part, target in zip(rows.split(ctx.images), targets, strict=True):
            values.append(_to_points(transforms.inputs, part))
            products = functional.conv2d(
                values[-1], filters, biases, padding=(0, taps // 2), groups=points
            )
            _from_points(transforms.outputs, products, target)
        ctx.save_for_backward(filters, *values)
        ctx.biased = bias is not None
        ctx.shape = rows.shape
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        filters, *values = ctx.saved_tensors
        _, _, width, inputs = ctx.shape
        taps = filters.shape[3]
        transforms = matrices(width, taps)
        points = len(transforms.filters)
        wanted = [ctx.needs_input_grad[0], True, ctx.biased]
        rows = gradient.permute(0, 2, 3, 1)
        of_rows = rows.new_empty(ctx.shape) if wanted[0] else None
        of_filters, of_biases = torch.zeros_like(filters), rows.new_zeros(len(filters))
        for place, part in enumerate(rows.split(ctx.images)):
            of_values, of_filter, of_bias = torch.ops.aten.convolution_backward(
                _to_points(transforms.outputs.T, part),
                values[place],
                filters,
                [len(filters)],
                [1, 1],
                [0, taps // 2],
                [1, 1],
                False,
                [0, 0],
                points,
                wanted,
            )
            of_filters += of_filter
            if ctx.biased:
                of_biases += of_bias
            if of_rows is not None:
                _from_points(transforms.inputs.T, of_values, of_rows.split(ctx.images)[place])
        of_weight = transforms.filters.T @ of_filters.permute(0, 2, 3, 1).reshape(points, -1)
        return (
            None if of_rows is None else of_rows.permute(0, 3, 1, 2),
            of_weight.view(taps, -1, taps, inputs).permute(1, 3, 2, 0),
            _at_one(points) @ of_biases.view(points, -1) if ctx.biased else None,
        )


def _at_one(points: int) -> torch.Tensor:
    return torch.eye(points)[1]


def _to_points(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Transform [N, H, W, C] by [tiles * points, W]."""
    number, height, width, channels = rows.shape
    lines = rows.reshape(-1, width, channels)
    values = torch.bmm(matrix.expand(len(lines), *matrix.shape), lines)
    points = len(POINTS) + 1
    values = values.view(number, height, -1, points * channels).transpose(1, 2)
    return values.reshape(-1, 1, height, points * channels).permute(0, 3, 1, 2)


def _from_points(matrix: torch.Tensor, values: torch.Tensor, target: torch.Tensor) -> None:
    """Write to `target`, [N, H, W, C], the values transformed by [W, tiles * points]."""
    number, height, width, channels = target.shape
    lines = values.permute(0, 2, 3, 1).reshape(number, -1, height, values.shape[1])
    lines = lines.transpose(1, 2).reshape(number * height, -1, channels)
    matrix = matrix.expand(len(lines), *matrix.shape)
    torch.bmm(matrix, lines, out=target.view(-1, width, channels))
