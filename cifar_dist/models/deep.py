"""The deep BatchNorm network of the tutorials: eight convolutions in four pairs."""

from itertools import pairwise

from torch import nn

from cifar_dist.models.layers import convolution, half_size, linear_head


def deep(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build pairs of 3x3 convolutions of 64, 128, 256 and 512 channels, and a linear head.

    BatchNorm follows each convolution. ReLU and 2x2 max pooling follow each pair. The head has
    2048-256-64-classes units.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([3, 64, 128, 256, 512]):
        layers += [convolution(inputs, outputs, 3), convolution(outputs, outputs, 3)]
        layers += [nn.ReLU(inplace=True), half_size()]
    return nn.Sequential(*layers, linear_head(num_classes, dropout))
