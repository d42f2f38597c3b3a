"""ResNet-18, -34 and -50 (He et al., 2015) with the 3x3 stem used for small images."""

from collections.abc import Callable

from torch import nn

from cifar_dist.models.layers import AveragePool, Residual, convolution, two_convolutions


def resnet18(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-18: 2 basic blocks per stage, 11.2 million parameters."""
    return _resnet(two_convolutions, 1, [2, 2, 2, 2], num_classes, dropout)


def resnet34(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-34: 3, 4, 6 and 3 basic blocks, 21.3 million parameters."""
    return _resnet(two_convolutions, 1, [3, 4, 6, 3], num_classes, dropout)


def resnet50(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-50: 3, 4, 6 and 3 bottleneck blocks, 23.5 million parameters."""
    return _resnet(_bottleneck, 4, [3, 4, 6, 3], num_classes, dropout)


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, width, 1),
        nn.ReLU(inplace=True),
        convolution(width, width, 3, stride),
        nn.ReLU(inplace=True),
        convolution(width, width * 4, 1),
    )


def _resnet(
    body: Callable[[int, int, int], nn.Sequential],
    expansion: int,
    depths: list[int],
    num_classes: int,
    dropout: float,
) -> nn.Module:
    layers: list[nn.Module] = [convolution(3, 64, 3), nn.ReLU(inplace=True)]
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        outputs = width * expansion
        for position in range(depth):
            stride = 2 if stage and not position else 1
            own, same = body(inputs, width, stride), inputs == outputs and stride == 1
            shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)
            layers += [Residual(own, shortcut, nn.ReLU(inplace=True))]
            inputs = outputs
    head = [AveragePool(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers, *head)
