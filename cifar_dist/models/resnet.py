"""ResNet-18, -34 and -50 (He et al., 2015) with the 3x3 stem used for small images."""

import torch
from torch import nn

from cifar_dist.models.layers import AveragePool, convolution


def resnet18(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-18: 2 basic blocks per stage, 11.2 million parameters."""
    return _resnet(_Basic, [2, 2, 2, 2], num_classes, dropout)


def resnet34(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-34: 3, 4, 6 and 3 basic blocks, 21.3 million parameters."""
    return _resnet(_Basic, [3, 4, 6, 3], num_classes, dropout)


def resnet50(num_classes: int, dropout: float = 0.0) -> nn.Module:
    """Build ResNet-50: 3, 4, 6 and 3 bottleneck blocks, 23.5 million parameters."""
    return _resnet(_Bottleneck, [3, 4, 6, 3], num_classes, dropout)


class _Residual(nn.Module):
    """ReLU(body(x) + shortcut(x)). The shortcut is a 1x1 convolution if the shape changes."""

    def __init__(self, body: nn.Sequential, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.activation(self.body(images) + self.shortcut(images))
        return features


class _Basic(_Residual):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        body = nn.Sequential(
            convolution(inputs, width, 3, stride),
            nn.ReLU(inplace=True),
            convolution(width, width, 3),
        )
        super().__init__(body, inputs, width, stride)


class _Bottleneck(_Residual):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        body = nn.Sequential(
            convolution(inputs, width, 1),
            nn.ReLU(inplace=True),
            convolution(width, width, 3, stride),
            nn.ReLU(inplace=True),
            convolution(width, width * 4, 1),
        )
        super().__init__(body, inputs, width * 4, stride)


def _resnet(
    block: type[_Basic] | type[_Bottleneck], depths: list[int], num_classes: int, dropout: float
) -> nn.Module:
    layers: list[nn.Module] = [convolution(3, 64, 3), nn.ReLU(inplace=True)]
    inputs = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for position in range(depth):
            layers += [block(inputs, width, stride=2 if stage and not position else 1)]
            inputs = width * block.expansion
    head = [AveragePool(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, num_classes)]
    return nn.Sequential(*layers, *head)
