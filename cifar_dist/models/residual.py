"""The residual network of the tutorials: four blocks with 1x1 shortcuts (He et al., 2015)."""

from itertools import pairwise

from torch import nn

from cifar_dist.models.layers import (
    Residual,
    convolution,
    half_size,
    linear_head,
    two_convolutions,
)


def residual(num_classes: int, dropout: float = 0.4) -> nn.Module:
    """Build residual blocks of 64, 128, 256 and 512 channels, and a linear head.

    2x2 max pooling follows each block. The head has 2048-256-64-classes units.
    """
    blocks = [_block(inputs, outputs) for inputs, outputs in pairwise([3, 64, 128, 256, 512])]
    return nn.Sequential(*blocks, linear_head(num_classes, dropout))


def _block(inputs: int, outputs: int) -> Residual:
    """Return two 3x3 convolutions and a 1x1 shortcut, then ReLU and 2x2 max pooling."""
    return Residual(
        two_convolutions(inputs, outputs),
        convolution(inputs, outputs, 1),
        nn.Sequential(nn.ReLU(inplace=True), half_size()),
    )
