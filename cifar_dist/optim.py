"""Optimizers by name, all fused: faster, and able to skip a step without asking the host."""

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import nn

from cifar_dist.config import OptimConfig


class _Bare(torch.optim.Optimizer):
    """Without torch's wrappers around these methods, which tell its compiler to leave them alone.

    They import it for that, which takes a second of every start, also where nothing is compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(_Bare, torch.optim.SGD):
    """torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(_Bare, torch.optim.AdamW):
    """torch's (Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization")."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(SGD):
    """Momentum whose updates are made orthogonal for convolution filters; SGD for all else.

    The direction of a filter bank, seen as a matrix with a row a filter, is replaced by the nearest
    orthogonal one, and its length is kept constant (Jordan et al., 2024, "Muon: An optimizer for
    hidden layers in neural networks").

    Args:
        model: its parameters of four dimensions are filters, of two the head, others biases.
        config: rates and decay.
    """

    MOMENTUM = 0.85  # of what is not a filter

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        rates = {"bias": config.bias_lr, "head": config.head_lr}
        kinds = {"bias": lambda p: p.ndim not in (2, 4), "head": lambda p: p.ndim == 2}
        self.filters = [p for p in trained if p.ndim == 4]
        groups: list[dict[str, Any]] = [
            # Its momentum is kept here; what is left to SGD is the step itself.
            {"params": self.filters, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        ]
        for name, chosen in kinds.items():
            share = (rates[name] or config.lr) / config.lr
            groups.append({"params": [p for p in trained if chosen(p)], "share": share})
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.lr,
            momentum=self.MOMENTUM,
            nesterov=True,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.filter_momentum = config.momentum

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step, or change nothing if `found_inf` is 1, as torch's fused optimizers."""
        skip = getattr(self, "found_inf", None)
        banks = [p for p in self.filters if p.grad is not None]
        for (rows, columns), same in groupby(sorted(banks, key=_shape), key=_shape):
            group = list(same)
            updates = torch.stack([self._direction(p, skip).reshape(rows, columns) for p in group])
            for filters, update in zip(group, orthogonalise(updates), strict=True):
                length = rows**0.5 / filters.norm()
                filters.mul_(length if skip is None else torch.where(skip > 0, 1.0, length))
                filters.grad.copy_(update.view(filters.shape))  # type: ignore[union-attr]
        super().step()

    def _direction(self, filters: nn.Parameter, skip: torch.Tensor | None) -> torch.Tensor:
        """Update the momentum of a filter bank and return where it leads, ahead by one step."""
        state, gradient = self.state[filters], filters.grad
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(filters)
        average = state["momentum_buffer"]
        changed = average * self.filter_momentum + gradient
        average.copy_(changed if skip is None else torch.where(skip > 0, average, changed))
        return gradient + self.filter_momentum * average


def _shape(filters: torch.Tensor) -> tuple[int, int]:
    return len(filters), filters.numel() // len(filters)


def orthogonalise(matrices: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """Bring all singular values of float [B, M, N] near 1, keeping the singular vectors.

    Newton-Schulz iteration with the quintic of Jordan et al. (2024), tuned for few steps: values
    end between about 0.3 and 1.3. Each step multiplies by a polynomial of the Gram matrix, so the
    steps are taken on that, which is small, and only their product meets the matrices themselves.
    The large products are in bfloat16 on GPUs, where that is enough and faster.
    """
    precision = torch.bfloat16 if matrices.device.type == "cuda" else torch.float32
    work = matrices.to(precision)
    work = work / (work.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = work.shape[1] > work.shape[2]
    if tall:
        work = work.mT
    gram = (work @ work.mT).float()
    unit = torch.eye(gram.shape[1], device=gram.device)
    product = unit
    for _ in range(steps):
        factor = 3.4445 * unit - 4.7750 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    work = product.to(precision) @ work
    return (work.mT if tall else work).to(matrices.dtype)


def _sgd(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _adamw(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": Muon,
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of `model`.

    A group's learning rate is the schedule's times its "share", where it has one.
    """
    return OPTIMIZERS[config.name](model, config)
