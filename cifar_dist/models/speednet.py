"""The small networks of the CIFAR-10 speed records.

A fixed first layer whitens patches. Stages of convolution, pooling, normalisation and activation
follow, then a scaled linear head. From airbench (Jordan, 2024, "94% on CIFAR-10 in 3.29 Seconds on
a Single GPU"), which is based on hlb-CIFAR10 (Balsam, 2023) and on Page's ResNet-9 (2018).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

PATCH = 2  # side of the whitened patches, in pixels
WHITENING_EPSILON = 5e-4


class Operations:
    """The operations of the modules below. A faster implementation is a subclass."""

    @staticmethod
    def whiten(images: torch.Tensor, whitening: nn.Conv2d, activation: nn.Module) -> torch.Tensor:
        """Apply the first layer."""
        return activation(whitening(images))

    @staticmethod
    def convolve(images: torch.Tensor, convolution: nn.Conv2d) -> torch.Tensor:
        """Apply the first convolution of a stage."""
        return convolution(images)

    @staticmethod
    def finish(
        features: torch.Tensor, normalisation: nn.Module, activation: nn.Module, pool: bool
    ) -> torch.Tensor:
        """Apply 2x2 max pooling if `pool`, then normalisation and activation."""
        if pool:
            features = functional.max_pool2d(features, 2)
        return activation(normalisation(features))


class SpeedNet(nn.Module):
    """A network of the speed records.

    Args:
        num_classes: number of outputs.
        widths: channels of each stage. Each stage halves height and width.
        depth: convolutions per stage. The third and later ones have a residual connection.
        stride: stride of the whitened patches. At 2 they do not overlap, for a quarter of the
            arithmetic.
        dropout: dropout probability before the head.
    """

    operations = Operations

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (64, 256, 256),
        depth: int = 2,
        stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whitened = 2 * 3 * PATCH**2
        self.whitening = nn.Conv2d(3, whitened, PATCH, stride).requires_grad_(False)
        # With a bias of 1 the activation passes most of each filter's output instead of only the
        # positive half. The accuracy equals that of a trained bias, which would cost 4 % of a step.
        nn.init.ones_(self.whitening.get_parameter("bias"))
        stages = [Stage(*ends, depth) for ends in pairwise([whitened, *widths])]
        self.stages = nn.Sequential(nn.GELU(), *stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float [N, 3, H, W] to logits [N, num_classes]."""
        activation, *stages = self.stages
        features = self.operations.whiten(images, self.whitening, activation)
        for stage in stages:
            features = stage(features)
        pooled = functional.max_pool2d(features, features.shape[2:]).flatten(1)
        return self.head(self.dropout(pooled)) / pooled.shape[1]

    @torch.no_grad()
    def initialise_from(self, images: torch.Tensor) -> None:
        """Set the first layer to whitening: its outputs on `images` are uncorrelated.

        The filters are the eigenvectors of the covariance of all patches, scaled to unit variance.
        Each filter appears with both signs, because an activation follows.

        Args:
            images: normalised images, float [N, 3, H, W]. A thousand are enough.
        """
        products, count = torch.zeros((), dtype=torch.double), 0
        for part in images.split(500):
            patches = functional.unfold(part, PATCH).transpose(1, 2).flatten(0, 1)
            # Double precision, for the same filters on every device. MPS does not support it.
            patches = (patches.cpu() if patches.device.type == "mps" else patches).double()
            products, count = products + (patches.T @ patches).cpu(), count + len(patches)
        variances, directions = torch.linalg.eigh(products / count)
        filters = (directions / (variances + WHITENING_EPSILON).sqrt()).T
        filters = torch.cat([filters, -filters]).view_as(self.whitening.weight)
        self.whitening.weight.copy_(filters)


class Stage(nn.Module):
    """Convolution, 2x2 max pooling, normalisation, activation, then `depth` - 1 blocks."""

    operations = Operations

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.convolution = _convolution(inputs, outputs)
        self.first = nn.Sequential(_normalisation(outputs), nn.GELU())
        self.second = Block(outputs) if depth > 1 else None
        self.bridged = nn.ModuleList(Block(outputs) for _ in range(depth - 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / 2, W / 2]; a single pixel is not pooled."""
        features = self.operations.convolve(images, self.convolution)
        pool = min(features.shape[2:]) > 1  # small images reach the last stage as a single pixel
        normalisation, activation = self.first
        features = self.operations.finish(features, normalisation, activation, pool)
        if self.second is not None:
            features = self.second(features)
        for block in self.bridged:
            features = features + block(features)
        return features


class Block(nn.Sequential):
    """Convolution, normalisation, activation."""

    operations = Operations

    def __init__(self, channels: int) -> None:
        super().__init__(_convolution(channels, channels), _normalisation(channels), nn.GELU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map [N, channels, H, W] to the same shape."""
        convolution, normalisation, activation = self
        return self.operations.finish(convolution(images), normalisation, activation, False)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first `inputs` filters are initialised to the identity."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def _normalisation(channels: int) -> nn.BatchNorm2d:
    """Return BatchNorm without a trained scale, and with a high momentum."""
    normalisation = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    normalisation.weight.requires_grad_(False)
    return normalisation
