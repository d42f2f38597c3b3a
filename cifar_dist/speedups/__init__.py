"""Fused Triton kernels for GPUs, behind one function: `speed_up`.

The networks and the data are plain torch and do not know this package.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from cifar_dist.data.augment import Pixels
from cifar_dist.models.speednet import Block, SpeedNet, Stage


def speed_up(network: nn.Module, pixels: Pixels) -> tuple[nn.Module, Pixels]:
    """Return `network` and `pixels` with fused kernels where these apply; both compute the same.

    The kernels replace augmentation, and the operations of `cifar_dist.models.speednet` in any
    network that contains its modules. Names and shapes of all weights stay as they are.

    Args:
        network: on the device where it will run. It is changed in place.
        pixels: of its images.
    """
    if not runs_triton(next(network.parameters()).device):
        return network, pixels
    from cifar_dist.speedups import augment_kernel, speednet_kernels

    for module in network.modules():
        if isinstance(module, SpeedNet | Stage | Block):
            module.operations = speednet_kernels.FusedOperations
    if augment_kernel.implements(pixels.augment):
        pixels = augment_kernel.FusedPixels(pixels.mean, pixels.std, pixels.augment, pixels.seed)
    return network, pixels


def usable(tensor: torch.Tensor) -> bool:
    """Return whether to run a kernel on `tensor`.

    Not if torch.compile captures the operations, which fuses them itself, nor if they are traced,
    as TensorBoard cannot draw kernels.
    """
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not captured and runs_triton(tensor.device)


@cache
def runs_triton(device: torch.device) -> bool:
    """Return whether kernels can run on `device`: on a GPU, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None
