"""Kernels of our own, in Triton, for NVIDIA GPUs; torch's layers and functions do for all else."""

from functools import cache
from importlib.util import find_spec

import torch


def usable(tensor: torch.Tensor) -> bool:
    """Say whether to use them on this tensor.

    A compiler has its own, and traced, as for TensorBoard's graph, they could not be drawn.
    """
    whole = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not whole and tensor.is_cuda and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
