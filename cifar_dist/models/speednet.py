"""The small networks behind the CIFAR-10 speed records: a fixed first layer that whitens patches,
then stages of convolution, pooling, normalisation and activation, and a scaled linear head.

After airbench (Jordan, 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU"), which goes back to
hlb-CIFAR10 (Balsam, 2023) and to Page's ResNet-9 (2018).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from cifar_dist import speedups as kernels

PATCH = 2  # side of the whitened patches, in pixels
WHITENED_IMAGES = 1000
WHITENING_EPSILON = 5e-4


class SpeedNet(nn.Module):
    """See the module's docstring.

    Args:
        num_classes: outputs.
        widths: channels of each stage; every stage halves the image.
        stride: of the patches: at 2 they do not overlap, for a quarter of the arithmetic.
        depth: convolutions a stage; the third and later ones are bridged by a residual connection.
        dropout: before the head.
    """

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
        # With this bias the activation lets most of what a filter finds through, without one half
        # of it. As good as a trained one, which would take 4 % of a step.
        nn.init.ones_(self.whitening.get_parameter("bias"))
        stages = [_Stage(*ends, depth) for ends in pairwise([whitened, *widths])]
        self.stages = nn.Sequential(nn.GELU(), *stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map float [N, 3, H, W] to logits [N, num_classes]."""
        if kernels.usable(images):
            from cifar_dist.speedups.layers import whiten_activate

            features = self.stages[1:](whiten_activate(images, self.whitening))
        else:
            features = self.stages(self.whitening(images))
        pooled = functional.max_pool2d(features, features.shape[2:]).flatten(1)
        logits: torch.Tensor = self.head(self.dropout(pooled)) / pooled.shape[1]
        return logits

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """Set the first layer so that its outputs on these images are uncorrelated.

        Its filters are the eigenvectors of the covariance of all patches, each scaled to unit
        variance, and the same with opposite sign, as an activation follows.

        Args:
            images: normalised, float [N, 3, H, W]; WHITENED_IMAGES of them are plenty.
        """
        products, count = torch.zeros((), dtype=torch.double), 0
        for part in images.split(500):
            patches = functional.unfold(part, PATCH).transpose(1, 2).flatten(0, 1)
            # In double precision, for the same filters on any device; MPS has none.
            patches = (patches.cpu() if patches.device.type == "mps" else patches).double()
            products, count = products + (patches.T @ patches).cpu(), count + len(patches)
        variances, directions = torch.linalg.eigh(products / count)
        filters = (directions / (variances + WHITENING_EPSILON).sqrt()).T
        filters = torch.cat([filters, -filters]).view_as(self.whitening.weight)
        self.whitening.weight.copy_(filters)


class _Stage(nn.Module):
    """Convolution, 2x2 pooling, normalisation, activation; then more convolutions at that size."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        self.convolution = _convolution(inputs, outputs)
        self.first = nn.Sequential(_normalisation(outputs), nn.GELU())
        self.second = _Block(outputs) if depth > 1 else None
        self.bridged = nn.ModuleList(_Block(outputs) for _ in range(depth - 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weight = self.convolution.weight
        empty = images.shape[1] - weight.shape[1]  # channels that were added to please a GPU
        if empty:
            weight = functional.pad(weight, (0, 0, 0, 0, 0, empty))
            features = functional.conv2d(images, weight, padding=1)
        else:
            features = self.convolution(images)
        normalisation, activation = self.first
        pool = min(features.shape[2:]) > 1  # small images are a single pixel before the last stage
        features = _finish(features, normalisation, activation, pool)
        if self.second is not None:
            features = self.second(features)
        for block in self.bridged:
            features = features + block(features)
        return features


class _Block(nn.Sequential):
    """Convolution, normalisation, activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(_convolution(channels, channels), _normalisation(channels), nn.GELU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        convolution, normalisation, activation = self
        return _finish(convolution(images), normalisation, activation, pool=False)


def _finish(
    features: torch.Tensor, normalisation: nn.Module, activation: nn.Module, pool: bool
) -> torch.Tensor:
    """Do what follows a convolution: pool 2x2 if asked to, normalise, activate."""
    if type(normalisation) is nn.BatchNorm2d and kernels.usable(features):  # not SyncBatchNorm
        from cifar_dist.speedups.layers import pool_normalise_activate

        return pool_normalise_activate(features, normalisation, pool)
    finished: torch.Tensor = activation(
        normalisation(functional.max_pool2d(features, 2) if pool else features)
    )
    return finished


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Return a 3x3 convolution whose first filters pass their inputs on unchanged."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    with torch.no_grad():
        nn.init.dirac_(convolution.weight[:inputs])
    return convolution


def _normalisation(channels: int) -> nn.BatchNorm2d:
    """Return BatchNorm without a learned scale, and with a short memory for its statistics."""
    normalisation = nn.BatchNorm2d(channels, eps=1e-12, momentum=0.4)
    normalisation.weight.requires_grad_(False)
    return normalisation
