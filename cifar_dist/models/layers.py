"""Pieces that several architectures share."""

import torch
from torch import nn
from torch.nn import functional


class AveragePool(nn.Module):
    """Average pooling to `side` x `side`, as nn.AdaptiveAvgPool2d.

    Where the sizes divide, as they do but for odd image sizes, its gradient is repeatable on a GPU
    too, which torch's is not.
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
    """Return a convolution that keeps the image size at stride 1, with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def half_size() -> nn.MaxPool2d:
    """Return 2x2 max pooling that keeps the last row of an odd size, so that any size works."""
    return nn.MaxPool2d(2, ceil_mode=True)


def linear_head(num_classes: int, dropout: float) -> nn.Sequential:
    """Return the head 2048-256-64-classes for feature maps of 512 channels, at 32 pixels 2x2."""
    return nn.Sequential(
        AveragePool(2),  # changes nothing at 32 pixels
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2048, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, num_classes),
    )
