"""The deep BatchNorm network of the tutorials: eight convolutions in four pairs."""

from itertools import pairwise

from torch import nn

from cifar_dist.models.layers import convolution, half_size, linear_head


def deep(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Pairs of 3x3 convolutions of 64, 128, 256, 512 channels, then linear 2048-256-64-classes.

    In each pair BatchNorm follows both convolutions, and ReLU and 2x2 pooling follow the pair.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([3, 64, 128, 256, 512]):
        layers += [convolution(inputs, outputs, 3), convolution(outputs, outputs, 3)]
        layers += [nn.ReLU(inplace=True), half_size()]
    return nn.Sequential(*layers, linear_head(num_classes, dropout))
