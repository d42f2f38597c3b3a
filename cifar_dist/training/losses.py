"""The training loss: cross-entropy, or a function of the user's own."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from cifar_dist.config import TrainConfig
from cifar_dist.user_code import UserCode


class Loss:
    """Loss of logits, float [N, classes], for targets, int64 [N].

    Args:
        smoothing: share of each target spread over all classes, for cross-entropy.
        own: the user's function of logits and targets to the loss per image, [N].
    """

    def __init__(self, smoothing: float, own: Callable[..., torch.Tensor] | None = None) -> None:
        self._smoothing, self._own = smoothing, own

    def per_image(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of each image, float [N]."""
        return self._compute(logits, targets, "none")

    def sum(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum of the losses of all images, float []."""
        # torch's fused sum rounds differently from the sum of the losses per image.
        return self._compute(logits, targets, "sum")

    def _compute(self, logits: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        if self._own is None:
            return functional.cross_entropy(
                logits, targets, reduction=reduction, label_smoothing=self._smoothing
            )
        losses = self._own(logits, targets)
        return losses.sum() if reduction == "sum" else losses


def build_loss(config: TrainConfig, code: UserCode | None) -> Loss:
    """Return the training loss of a recipe.

    Args:
        code: the user's loss that `config.loss` names. A class is called without arguments first.

    Raises:
        UserCodeError: the class raised an exception.
    """
    if code is None:
        return Loss(config.label_smoothing)
    try:
        own: Any = code.object() if inspect.isclass(code.object) else code.object
    except Exception as error:
        raise code.fail("train.loss", error) from error
    return Loss(0.0, own)
