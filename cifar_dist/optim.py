"""Optimizers by name, all fused: faster, and able to skip a step without asking the host."""

from collections.abc import Callable

import torch
from torch import nn

from cifar_dist.config import OptimConfig


def _sgd(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,  # Loshchilov and Hutter, 2019
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of `model`."""
    return OPTIMIZERS[config.name](model, config)
