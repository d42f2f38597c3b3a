"""Optimizers by name, all fused: faster, and able to skip a step on the device."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from cifar_dist.config import OptimConfig


class _Bare(torch.optim.Optimizer):
    """Removes the wrappers that exclude these methods from torch.compile.

    They import torch._dynamo at the first step, also if nothing is compiled. That takes 1.1 s of
    CPU time in every process. The time of a step is the same.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(_Bare, torch.optim.SGD):
    """torch.optim.SGD."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class AdamW(_Bare, torch.optim.AdamW):
    """torch.optim.AdamW (Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization")."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(SGD):
    """SGD with orthogonalised momentum for convolution filters; plain SGD for other parameters.

    The momentum of a convolution's weight, as a matrix with one row per filter, is replaced by the
    nearest orthogonal matrix, and the norm of the weight is kept constant (Jordan et al., 2024,
    "Muon: An optimizer for hidden layers in neural networks").

    Args:
        model: parameters of four dimensions are filters, of two dimensions the head, and all
            others biases.
        config: learning rates, momentum of the filters and weight decay.
    """

    MOMENTUM = 0.85  # of the head and the biases

    def __init__(self, model: nn.Module, config: OptimConfig) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        rates = {"bias": config.bias_lr, "head": config.head_lr}
        kinds = {"bias": lambda p: p.ndim not in (2, 4), "head": lambda p: p.ndim == 2}
        self.filters = [p for p in trained if p.ndim == 4]
        groups: list[dict[str, Any]] = [
            # `_direct` computes their momentum, so SGD only adds the update.
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
        """Take a step; change nothing if `found_inf` is 1, like torch's fused optimizers."""
        banks = [p for p in self.filters if p.grad is not None]
        if banks:
            self._direct(banks)
        super().step()

    def _direct(self, banks: list[nn.Parameter]) -> None:
        """Set the norm of each filter weight, and replace its gradient with its update."""
        device = banks[0].device
        skip = getattr(self, "found_inf", torch.zeros((), device=device)) > 0
        gradients = [p.grad for p in banks if p.grad is not None]
        for filters in banks:
            if "momentum_buffer" not in self.state[filters]:
                self.state[filters]["momentum_buffer"] = torch.zeros_like(filters)
        averages = [self.state[p]["momentum_buffer"] for p in banks]
        changed = torch._foreach_mul(averages, self.filter_momentum)
        torch._foreach_add_(changed, gradients)
        for average, values in zip(averages, changed, strict=True):
            torch.where(skip, average, values, out=average)
        # Nesterov momentum, as matrices with one row per filter in channels-last order.
        ahead = torch._foreach_add(gradients, averages, alpha=self.filter_momentum)
        updates = orthogonalise([values.permute(0, 2, 3, 1).flatten(1) for values in ahead])
        for gradient, update in zip(gradients, updates, strict=True):
            there = gradient.permute(0, 2, 3, 1)
            there.copy_(update.view(there.shape))
        lengths = torch.stack(torch._foreach_norm(list[torch.Tensor](banks)))
        factors = _constants(tuple(len(p) ** 0.5 for p in banks), device) / lengths
        for filters, factor in zip(banks, torch.where(skip, 1.0, factors), strict=True):
            filters.mul_(factor)


@lru_cache
def _constants(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Return float [N], cached because copying it to the device makes the host wait."""
    return torch.tensor(values, device=device)


@lru_cache
def _diagonal(
    value: float, rows: int, precision: torch.dtype, device: torch.device
) -> torch.Tensor:
    return value * torch.eye(rows, dtype=precision, device=device)


def orthogonalise(matrices: Sequence[torch.Tensor], steps: int = 3) -> list[torch.Tensor]:
    """Bring all singular values of each float [M, N] close to 1 and keep the singular vectors.

    Newton-Schulz iteration with the quintic of Jordan et al. (2024), tuned for few steps. The
    singular values end between about 0.3 and 1.3. Each step multiplies by a polynomial of the Gram
    matrix. The iteration therefore runs on the small Gram matrices, batched over all matrices of
    the same height, and each matrix is multiplied only by the final product. On GPUs it runs in
    bfloat16, which is precise enough and faster.
    """
    device = matrices[0].device
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    scales = 1 / (torch.stack(torch._foreach_norm(list(matrices))) + 1e-7)
    wide = [m.mT if m.shape[0] > m.shape[1] else m for m in matrices]
    wide = [m.to(precision) for m in wide]
    results = wide.copy()
    for rows in sorted({len(m) for m in wide}):
        places = [place for place, m in enumerate(wide) if len(m) == rows]
        scale = torch.stack([scales[place] for place in places])[:, None, None]
        gram = torch.stack([wide[place] @ wide[place].mT for place in places])
        gram = (gram * scale**2).to(precision)
        unit, product = _diagonal(3.4445, rows, precision, device), None
        for step in range(steps):
            factor = torch.add(unit, gram, alpha=-4.7750).baddbmm_(gram, gram, alpha=2.0315)
            product = factor * scale if product is None else factor @ product
            product = product.to(precision)
            if step + 1 < steps:
                gram = factor @ gram @ factor
        assert product is not None
        for place, whole in zip(places, product, strict=True):
            results[place] = whole @ wide[place]
    return [
        result if result.shape == m.shape else result.mT
        for result, m in zip(results, matrices, strict=True)
    ]


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": lambda model, config: SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    ),
    "adamw": lambda model, config: AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    ),
    "muon": Muon,
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer of all parameters of `model`.

    A group's learning rate is the schedule's times its "share", where it has one.
    """
    return OPTIMIZERS[config.name](model, config)
