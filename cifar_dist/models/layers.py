"""Layers that several networks share."""

import torch
from torch import nn
from torch.nn import functional


class AveragePool(nn.Module):
    """Average pooling to `side` x `side`, as nn.AdaptiveAvgPool2d.

    The gradient of torch's version is not deterministic on a GPU. This one is deterministic if
    `side` divides the size of the feature map, which holds for all but odd image sizes.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Pool [N, C, H, W] to [N, C, side, side]."""
        height, width = images.shape[2:]
        if (height, width) == (self.side, self.side):
            return images
        if height % self.side or width % self.side:
            return functional.adaptive_avg_pool2d(images, self.side)
        return functional.avg_pool2d(images, (height // self.side, width // self.side))


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and BatchNorm. At stride 1 the image size is kept."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def two_convolutions(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return two 3x3 convolutions with BatchNorm, and ReLU between them."""
    return nn.Sequential(
        convolution(inputs, outputs, 3, stride),
        nn.ReLU(inplace=True),
        convolution(outputs, outputs, 3),
    )


class Residual(nn.Module):
    """finish(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, finish: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.finish = body, shortcut, finish

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.finish(self.body(images) + self.shortcut(images))


def half_size() -> nn.MaxPool2d:
    """Return 2x2 max pooling that rounds odd sizes up, so that any image size works."""
    return nn.MaxPool2d(2, ceil_mode=True)


def linear_head(num_classes: int, dropout: float) -> nn.Sequential:
    """Return the head 2048-256-64-classes for feature maps [N, 512, H, W], pooled to 2x2."""
    return nn.Sequential(
        AveragePool(2),  # the identity for 32x32 images
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2048, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, num_classes),
    )
