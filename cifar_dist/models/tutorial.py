"""The small network of the CIFAR-10 tutorials: three 5x5 convolutions and a linear head.

The tutorials' version has no activation between its layers, and neither has this one; pooling is
its only non-linearity. Two variants follow the way the tutorials improve it.
"""

from itertools import pairwise

from torch import nn

from cifar_dist.models.layers import AveragePool, half_size


def tutorial(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Convolutions 3-32-32-64, each followed by 2x2 pooling, then linear 1024-64-classes."""
    return _network([64], num_classes, activate=False, dropout=dropout)


def tutorial_wide(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """The same convolutions with a head of three linear layers, 1024-512-64-classes."""
    return _network([512, 64], num_classes, activate=False, dropout=dropout)


def tutorial_relu(num_classes: int, dropout: float = 0.25) -> nn.Module:
    """The wide head, with ReLU after every layer and dropout between the linear ones."""
    return _network([512, 64], num_classes, activate=True, dropout=dropout)


def _network(hidden: list[int], num_classes: int, activate: bool, dropout: float) -> nn.Module:
    def activation() -> list[nn.Module]:
        return [nn.ReLU(inplace=True)] if activate else []

    layers: list[nn.Module] = []
    for inputs, outputs in pairwise([3, 32, 32, 64]):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), *activation()]
        layers += [half_size()]
    layers += [AveragePool(4), nn.Flatten()]  # changes nothing at 32 pixels
    widths = [1024, *hidden]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), *activation()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))
