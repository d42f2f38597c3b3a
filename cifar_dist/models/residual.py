"""The residual network of the tutorials: four blocks with 1x1 shortcuts (He et al., 2015)."""

from itertools import pairwise

import torch
from torch import nn

from cifar_dist.models.layers import convolution, half_size, linear_head


def residual(num_classes: int, dropout: float = 0.4) -> nn.Module:
    """Build residual blocks of 64, 128, 256 and 512 channels, and a linear head.

    2x2 max pooling follows each block. The head has 2048-256-64-classes units.
    """
    blocks = [_Block(inputs, outputs) for inputs, outputs in pairwise([3, 64, 128, 256, 512])]
    return nn.Sequential(*blocks, linear_head(num_classes, dropout))


class _Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a 1x1 shortcut, then ReLU and 2x2 max pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(inputs, outputs, 3),
            nn.ReLU(inplace=True),
            convolution(outputs, outputs, 3),
        )
        self.shortcut = convolution(inputs, outputs, 1)
        self.finish = nn.Sequential(nn.ReLU(inplace=True), half_size())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.finish(self.body(images) + self.shortcut(images))
        return features
