"""The small network of the CIFAR-10 tutorials: three 5x5 convolutions and a linear head.

As in the tutorials, there is no activation between the layers; max pooling is the only
non-linearity. The two variants are the improvements that the tutorials make.
"""

from itertools import pairwise

from torch import nn

from cifar_dist.models.layers import AveragePool, half_size


def tutorial(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build convolutions 3-32-32-64, each with 2x2 max pooling, and a head 1024-64-classes."""
    return _network([64], num_classes, activate=False, dropout=dropout)


def tutorial_wide(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build the same convolutions with a head of three linear layers, 1024-512-64-classes."""
    return _network([512, 64], num_classes, activate=False, dropout=dropout)


def tutorial_relu(num_classes: int, dropout: float = 0.25) -> nn.Module:
    """Build tutorial_wide with ReLU after every layer and dropout between the linear layers."""
    return _network([512, 64], num_classes, activate=True, dropout=dropout)


def _network(hidden: list[int], num_classes: int, activate: bool, dropout: float) -> nn.Module:
    def activation() -> list[nn.Module]:
        return [nn.ReLU(inplace=True)] if activate else []

    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([3, 32, 32, 64]):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), *activation()]
        layers += [half_size()]
    layers += [AveragePool(4), nn.Flatten()]  # pooling is the identity for 32x32 images
    widths = [1024, *hidden]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
