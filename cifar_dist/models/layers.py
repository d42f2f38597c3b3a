"""Pieces that several architectures share."""

from torch import nn


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution that keeps the image size at stride 1, with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    )


def half_size() -> nn.MaxPool2d:
    """Return 2x2 max pooling that keeps the last row of an odd size, so that any size works."""
    return nn.MaxPool2d(2, ceil_mode=True)


def linear_head(classes: int, dropout: float) -> nn.Sequential:
    """Return the head 2048-256-64-classes for feature maps of 512 channels, at 32 pixels 2x2."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(2),  # changes nothing at 32 pixels
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(2048, 256),
        nn.ReLU(inplace=True),
        nn.Linear(256, 64),
        nn.ReLU(inplace=True),
        nn.Linear(64, classes),
    )
