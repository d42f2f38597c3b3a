"""Checks of the numbers: NaN never reaches the weights, and ranks whose weights drift are found.

With a fused optimizer no step makes the host wait for the device: the device skips the step, and
the host reads the number of skipped steps where it waits anyway.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from cifar_dist.errors import RunError

SHOWN = 8  # samples named in a message


class Guard:
    """Turns every optimizer step into a no-op after the first non-finite gradient norm.

    Averaging gradients over processes spreads a NaN, so all processes skip the same steps.

    Args:
        optimizer: not yet prepared by Accelerate.
        device: of its parameters.

    Attributes:
        on_device: whether the device skips the step: torch's fused optimizers change nothing while
            their `found_inf` is 1, as for GradScaler. Other optimizers, and the fused ones of MPS,
            ignore it, so the host reads the flag before each step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._poison = torch.zeros((), device=device)  # 0, or NaN from the first bad norm on
        self._skip = torch.zeros((), device=device)
        self._skipped = torch.zeros((), device=device)
        self.on_device = bool(optimizer.defaults.get("fused")) and device.type != "mps"
        if self.on_device:
            optimizer.found_inf = self._skip  # type: ignore[attr-defined]

    def admits(self, norm: torch.Tensor) -> bool:
        """Take the gradient norm of a step, float [], and return whether to call the optimizer."""
        self._poison.add_(norm, alpha=0)
        torch.ne(self._poison, self._poison, out=self._skip)
        self._skipped.add_(self._skip)
        return self.on_device or not self._skip.item()

    def skipped(self) -> int:
        """Return how many of the latest steps were skipped; waits for the device."""
        return int(self._skipped.item())


def scale_showing(loss: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return `scale`, or NaN if the loss is NaN or infinite, so that the gradients become NaN.

    Without it an infinite loss could have finite gradients.
    """
    return torch.add(scale, loss.detach(), alpha=0)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients together, float [].

    The same as torch.nn.utils.get_total_norm at half its cost, for one device and dtype.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def bad_samples(
    losses: torch.Tensor, positions: torch.Tensor, gradient_norm: Callable[[torch.Tensor], float]
) -> list[str]:
    """Describe the samples of this process that have a NaN or infinite loss or gradient.

    Args:
        losses: loss per sample, float [N], with its autograd graph.
        positions: of the samples in the training set, int64 [N].
        gradient_norm: returns the norm of the gradients of a loss.
    """
    bad = ~losses.isfinite()
    if bad.any():
        named = zip(positions[bad].tolist(), losses[bad].tolist(), strict=True)
        return [f"{position} (loss {loss})" for position, loss in named]

    def is_bad(part: torch.Tensor) -> bool:
        return not torch.tensor(gradient_norm(losses[part].sum())).isfinite()

    part = torch.arange(len(losses), device=losses.device)
    if not is_bad(part):
        return []
    while len(part) > 1:  # bisect; if only the sum of both halves is bad, keep both
        halves = part.tensor_split(2)
        found = next((half for half in halves if is_bad(half)), None)
        if found is None:
            break
        part = found
    return [f"{position} (gradient)" for position in positions[part].tolist()]


def describe_bad_step(accelerator: Accelerator, mine: Sequence[str], step: int) -> RunError:
    """Return the error about the first bad step, with the samples that every process found.

    Every process must call it.

    Args:
        mine: what `bad_samples` returned on this process.
    """
    found = gather_object([(accelerator.process_index, list(mine))])
    where = [
        f"on rank {rank}, training images {', '.join(named[:SHOWN])}"
        + (f" and {len(named) - SHOWN} more" if len(named) > SHOWN else "")
        for rank, named in found
        if named
    ]
    return RunError(
        f"a loss or gradient is not finite at step {step}"
        + (f" {'; '.join(where)}" if where else " (the sum over all samples overflows)")
        + f"; the weights are still those of step {step - 1}; continue from the newest checkpoint "
        "with a lower optim.lr, a warm-up or train.clip_norm"
    )


def require_equal_weights(
    accelerator: Accelerator, network: nn.Module, step: int, since: int
) -> None:
    """Compare the bits of all weights across processes; every process must call it.

    Args:
        step: current optimizer step.
        since: step of the previous comparison.

    Raises:
        RunError: weights differ; names the ranks that differ from rank 0 and the first tensor.
    """
    if accelerator.num_processes == 1:
        return
    names = [name for name, _ in network.named_parameters()]
    rows: torch.Tensor = accelerator.gather(weight_sums(network)[None])
    different = rows != rows[0]
    if not different.any():
        return
    ranks = different.any(dim=1).nonzero().flatten().tolist()
    name = names[int(different.any(dim=0).nonzero()[0])]
    raise RunError(
        f"the weights of {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} are "
        f"no longer those of rank 0 at step {step} (first in {name}); they were equal at step "
        f"{since}; nothing was saved since; look for a faulty device, or code that depends on the "
        "rank, and continue from the newest checkpoint"
    )


def weight_sums(network: nn.Module) -> torch.Tensor:
    """Return the sum of the bit patterns of each weight tensor, int64 [tensors].

    A change of one element always changes the sum.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.stack(
        [
            weights.detach().view(integers[weights.element_size()]).sum(dtype=torch.int64)
            for weights in network.parameters()
        ]
    )
