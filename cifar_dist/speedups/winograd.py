"""Convolutions in a quarter of the multiplications, for a CPU: here 3x3; 5x5 in winograd_rows.

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, 2015, "Fast Algorithms for Convolutional
Neural Networks"): 36 products give a 4x4 tile of outputs, where the definition takes 144. Tiles of
6x6 inputs, filters and outputs are transformed by constant matrices; between them stand 36 matrix
products over the channels. cuDNN does the same on a GPU; PyTorch's library for CPUs does not.
Rounding is that of float32 with about one decimal digit less than the definition's.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cifar_dist.speedups import winograd_rows

TILE, WINDOW = 4, 6  # sides of the outputs and of the inputs of one tile
WIDE = {3: 128, 5: 32}  # channels from which the products outweigh the transforms; measured

_INPUT = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float32,
)
_FILTER = torch.tensor(
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
    dtype=torch.float64,
).div(24)
_OUTPUT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float32,
)
# Both directions at once: [36, 36], [36, 9] and [16, 36].
INPUT, OUTPUT = torch.kron(_INPUT, _INPUT), torch.kron(_OUTPUT, _OUTPUT)
FILTER = torch.kron(_FILTER, _FILTER).float()


def use_winograd(network: nn.Module) -> None:
    """Have the 3x3 and 5x5 convolutions of `network` that are wide enough work this way on a CPU.

    Names, weights and results, but for rounding, stay as they are.
    """
    for module in network.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = WinogradConv2d


def _fits(convolution: nn.Conv2d) -> bool:
    size = convolution.kernel_size[0]
    shape = (convolution.kernel_size, convolution.padding, convolution.stride, convolution.dilation)
    return (
        size in WIDE
        and shape == ((size, size), (size // 2, size // 2), (1, 1), (1, 1))
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
        and min(convolution.in_channels, convolution.out_channels) >= WIDE[size]
    )


class WinogradConv2d(nn.Conv2d):
    """nn.Conv2d of stride 1, images padded to their size, that takes the short way if there is one.

    The filters are 3x3 or 5x5.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map [N, C, H, W] to [N, K, H, W]."""
        plain = images.device.type == "cpu" and images.dtype == self.weight.dtype == torch.float32
        # Compiled, the transforms gain nothing on what the compiler has for the definition; traced,
        # as for TensorBoard's graph, a function of ours could not be drawn.
        whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not plain or whole or torch.is_autocast_enabled("cpu"):
            return super().forward(images)
        height, width = images.shape[2:]
        outputs: torch.Tensor
        if self.kernel_size == (5, 5):
            if not winograd_rows.pays(width):
                return super().forward(images)
            outputs = winograd_rows.Convolution.apply(images, self.weight, self.bias)
            return outputs
        if 2 * height * width < _tiles(height) * _tiles(width) * TILE * TILE:
            return super().forward(images)
        outputs = _Winograd.apply(images, self.weight)
        return outputs if self.bias is None else outputs + self.bias[:, None, None]


def _tiles(side: int) -> int:
    return -(-side // TILE)


class _Winograd(torch.autograd.Function):
    # Tiles are [N * rows * columns, 36 or 16, channels]: the places in a tile, row by row, lie
    # together, so that a transform finds all it needs of a tile in a core's cache.

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        number, inputs, height, width = images.shape
        rows, columns = _tiles(height), _tiles(width)
        border = (1, 1 + columns * TILE - width, 1, 1 + rows * TILE - height)
        padded = functional.pad(images.permute(0, 2, 3, 1), (0, 0, *border)).contiguous()
        image, row, pixel, channel = padded.stride()
        windows = padded.as_strided(
            (number, rows, columns, WINDOW, WINDOW, inputs),
            (image, TILE * row, TILE * pixel, row, pixel, channel),
        )
        tiles = _of_each(INPUT, windows.reshape(-1, 36, inputs))
        filters = (FILTER @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, -1, inputs)
        products = torch.bmm(tiles.transpose(0, 1), filters.transpose(1, 2))
        # Not a view of the tiles, so that an activation may overwrite it.
        outputs = torch.empty(
            (number, len(weight), rows * TILE, columns * TILE), memory_format=torch.channels_last
        )
        ground = outputs.permute(0, 2, 3, 1).unflatten(1, (rows, TILE))
        ground = ground.unflatten(3, (columns, TILE)).transpose(2, 3)
        ground.copy_(_of_each(OUTPUT, products.transpose(0, 1)).view(ground.shape))
        ctx.save_for_backward(tiles, filters)
        ctx.shape = images.shape
        if outputs.shape[2:] == images.shape[2:]:
            return outputs
        return outputs[:, :, :height, :width].clone(memory_format=torch.channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        tiles, filters = ctx.saved_tensors
        number, inputs, height, width = ctx.shape
        rows, columns = _tiles(height), _tiles(width)
        border = (0, columns * TILE - width, 0, rows * TILE - height)
        padded = functional.pad(gradient.permute(0, 2, 3, 1), (0, 0, *border))
        of_outputs = padded.unflatten(1, (rows, TILE)).unflatten(3, (columns, TILE)).transpose(2, 3)
        of_outputs = of_outputs.reshape(-1, TILE * TILE, filters.shape[1])
        of_products = _of_each(OUTPUT.T, of_outputs).transpose(0, 1)

        of_filters = torch.bmm(of_products.transpose(1, 2), tiles.transpose(0, 1))
        of_weight = (FILTER.T @ of_filters.view(36, -1)).view(3, 3, -1, inputs).permute(2, 3, 0, 1)
        if not ctx.needs_input_grad[0]:
            return None, of_weight

        of_tiles = torch.bmm(of_products, filters).transpose(0, 1)
        of_windows = _of_each(INPUT.T, of_tiles)
        of_windows = of_windows.view(number, rows, columns, WINDOW, WINDOW, inputs).transpose(2, 3)
        # Windows overlap by two pixels: first what lies on no other's ground, then the rest.
        of_padded = padded.new_zeros(number, (rows + 1) * TILE, (columns + 1) * TILE, inputs)
        for down in (0, TILE):
            for right in (0, TILE):
                ground = of_padded[:, down:, right:][:, : rows * TILE, : columns * TILE]
                ground = ground.unflatten(1, (rows, TILE)).unflatten(3, (columns, TILE))
                part = of_windows[:, :, down : down + TILE, :, right : right + TILE]
                ground[:, :, : part.shape[2], :, : part.shape[4]] += part
        return of_padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2), of_weight


def _of_each(matrix: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return matrix @ block for each block of [B, N, C]."""
    return torch.bmm(matrix.expand(len(blocks), *matrix.shape), blocks)
