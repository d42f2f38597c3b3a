"""The training step and the evaluation: the only place that computes gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from cifar_dist.config import TrainConfig
from cifar_dist.data.augment import Pixels, mix_integers
from cifar_dist.data.batches import GlobalBatches
from cifar_dist.training.guard import (
    Guard,
    bad_samples,
    describe_bad_step,
    gradient_norm,
    scale_showing,
)
from cifar_dist.training.losses import Loss
from cifar_dist.training.metrics import Evaluation, Outcome, Tally, summarise
from cifar_dist.training.replay import Recorded

# Views of an image for test-time augmentation: weight, mirrored, shift down, shift right.
SHIFTS = ((1 / 4, 0, 0), (1 / 8, -1, -1), (1 / 8, 1, 1))
VIEWS: dict[str, list[tuple[float, bool, int, int]]] = {
    "none": [(1.0, False, 0, 0)],
    "flip": [(1 / 2, False, 0, 0), (1 / 2, True, 0, 0)],
    "flip_shift": [(share, flip, y, x) for flip in (False, True) for share, y, x in SHIFTS],
}


@dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
        network: the bare module.
        model: the module as Accelerate prepared it.
        optimizer: prepared by Accelerate if fp16's loss scaling needs that. Otherwise it is torch's
            own, because Accelerate's wrapper looks up packages and signatures at each call.
        average: exponential moving average of the weights, or None.
        guard: skips steps with NaN or infinite gradients; None in fp16, where the loss scaling
            does it.
        tally: loss and accuracy of this epoch so far, of this process.
        step: optimizer steps since the start of the run.
        gradient_norm: of the last step, before clipping; float [] on the device.
        recorded: the whole step as a CUDA graph, if it can be recorded.
        host_read: module whose code reads a tensor's value on the host, which a CUDA graph cannot
            do; "" if there is none.
    """

    network: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    guard: Guard | None
    tally: Tally
    step: int
    gradient_norm: torch.Tensor
    recorded: Recorded | None = None
    host_read: str = ""

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: the moving average if there is one."""
        return self.networks[-1]

    @property
    def networks(self) -> list[nn.Module]:
        """The network, and its moving average if there is one."""
        return [self.network] if self.average is None else [self.network, self.average.module]


def train_epoch(
    accelerator: Accelerator,
    state: TrainState,
    loader: DataLoader,
    pixels: Pixels,
    config: TrainConfig,
    loss: Loss,
    schedule: Callable[[int], float],
    epoch: int,
) -> Iterator[None]:
    """Train on the remaining batches of an epoch and yield after each optimizer step.

    Args:
        loader: this process's slices of the global micro-batches.
        schedule: returns the learning rate of a step.
    """
    # DDP averages gradients over processes. With this factor they are the gradients of the mean
    # loss over the global batch.
    scale = torch.tensor(accelerator.num_processes / config.batch_size, device=accelerator.device)
    parameters = list(state.network.parameters())
    # accelerator.backward divides by Accelerate's number of accumulation steps first, which is 1.
    backward = accelerator.backward if accelerator.scaler else torch.Tensor.backward

    def add_gradients(images: torch.Tensor, labels: torch.Tensor) -> None:
        logits = state.model(images)
        loss_sum = loss.sum(logits, labels)
        # Passing `gradient=` instead would make torch import its symbolic shapes, which is slow.
        backward(loss_sum * scale_showing(loss_sum, scale))
        state.tally.add(loss_sum, logits, labels)

    def update() -> None:
        accelerator.unscale_gradients(state.optimizer)
        state.gradient_norm = gradient_norm(parameters)
        if config.clip_norm:
            clip_grads_with_norm_(parameters, config.clip_norm, state.gradient_norm)
        if state.guard is None or state.guard.admits(state.gradient_norm):
            state.optimizer.step()

    def whole_step(images: torch.Tensor, labels: torch.Tensor) -> None:
        state.optimizer.zero_grad()
        add_gradients(images, labels)
        update()

    if (
        state.recorded is None
        and not state.host_read
        and can_record(accelerator, config, state.guard)
    ):
        state.recorded = Recorded(whole_step)
        for group in state.optimizer.param_groups:  # a CUDA graph reads the rate from a tensor
            group["lr"] = torch.zeros((), device=accelerator.device)
            group["capturable"] = True  # AdamW requires it
    state.model.train()
    for number, batch in enumerate(loader):
        part = number % config.accumulate
        last = part == config.accumulate - 1
        seed_step(accelerator, config, state.step, part)
        images = pixels.for_training(batch, epoch)
        if part == 0:
            set_learning_rate(state, schedule(state.step))
        if state.recorded is not None:
            state.recorded(images, batch.labels)
        else:
            if part == 0:
                state.optimizer.zero_grad()
            with nullcontext() if last else accelerator.no_sync(state.model):
                add_gradients(images, batch.labels)
            if not last:
                continue
            update()
        if state.average is not None:
            state.average.update_parameters(state.network)
        state.step += 1
        yield


def can_record(accelerator: Accelerator, config: TrainConfig, guard: Guard | None) -> bool:
    """Return whether each step is the same sequence of kernels, without other processes.

    A guard that decides on the host, and loss scaling in fp16 (no guard), wait for the device.
    Gradient accumulation has steps of several kinds.
    """
    alone = accelerator.num_processes == 1 and config.accumulate == 1
    return alone and accelerator.device.type == "cuda" and guard is not None and guard.on_device


def set_learning_rate(state: TrainState, rate: float) -> None:
    """Set the learning rate of every param group: `rate` times the group's multiplier."""
    for group in state.optimizer.param_groups:
        own = rate * group.get("share", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def settle_buckets(state: TrainState, image_size: int) -> None:
    """Make DDP rebuild its gradient buckets before the first step; every process must call it.

    DDP rebuilds them after its first backward pass, in the order in which the gradients arrived.
    This changes the order in which gradients of three or more processes are added, so a resumed run
    would round differently from an uninterrupted one. This function runs a forward and backward
    pass that changes nothing.
    """
    buffers = [buffer.clone() for buffer in state.network.buffers()]
    device = next(state.network.parameters()).device
    state.model.train()
    state.model(torch.zeros(2, 3, image_size, image_size, device=device)).sum().backward()
    state.network.zero_grad()
    with torch.no_grad():
        for buffer, before in zip(state.network.buffers(), buffers, strict=True):
            buffer.copy_(before)


def seed_step(accelerator: Accelerator, config: TrainConfig, step: int, part: int) -> None:
    """Seed dropout from (seed, step, micro-batch, rank), so that no generator is saved."""
    generator_of(accelerator.device).manual_seed(
        mix_integers(config.seed, step, part, accelerator.process_index)
    )


def generator_of(device: torch.device) -> torch.Generator:
    """Return the default generator of `device`.

    torch.manual_seed would look up the generators of all device types at each call.
    """
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def refuse_bad_numbers(
    accelerator: Accelerator,
    state: TrainState,
    loader: DataLoader,
    order: GlobalBatches,
    pixels: Pixels,
    config: TrainConfig,
    loss: Loss,
) -> None:
    """End the run if the guard has skipped a step; every process must call it.

    The skipped step is computed again to find the samples. The weights have not changed since.

    Raises:
        RunError: a loss or gradient is NaN or infinite; names step, ranks and samples.
    """
    skipped = state.guard.skipped() if state.guard else 0
    if not skipped:
        return
    step = state.step - skipped
    steps_per_epoch = len(order) // config.accumulate
    epoch = step // steps_per_epoch
    order.start_at(epoch, step % steps_per_epoch * config.accumulate)
    parameters = list(state.network.parameters())

    def norm_of(value: torch.Tensor) -> float:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return get_total_norm([g for g in gradients if g is not None]).item()

    mine: list[str] = []
    for part, batch in zip(range(config.accumulate), loader, strict=False):
        seed_step(accelerator, config, step, part)
        with accelerator.autocast():
            logits = state.network(pixels.for_training(batch, epoch)).float()
        losses = loss.per_image(logits, batch.labels)
        mine += bad_samples(losses, batch.positions, norm_of)
    raise describe_bad_step(accelerator, mine, step + 1)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    network: nn.Module,
    loader: DataLoader,
    pixels: Pixels,
    classes: int,
    tta: str = "none",
    between: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Evaluate `network` on every image of `loader` exactly once; every process must call it.

    Args:
        network: the bare module without DDP, because processes may have different numbers of
            batches.
        tta: a key of VIEWS; the weighted logits of all views are added.
        between: called on every process after each global batch. It may raise to abort.

    Raises:
        RuntimeError: not every image was counted once.
    """
    network.eval()
    device = accelerator.device
    expected = len(loader.dataset)  # type: ignore[arg-type]
    # Allocated at once: small tensors kept from each batch would fragment the memory between the
    # large buffers of the next ones.
    outcome, counted = Outcome.empty(expected, device), 0
    batches = iter(loader)
    for _ in range(len(loader)):  # some processes may have one batch fewer
        batch = next(batches, None)
        if batch is not None:
            images = pixels.for_evaluation(batch.images)
            with accelerator.autocast():
                parts = [
                    share * network(view(images, flip, down, right)).float()
                    for share, flip, down, right in VIEWS[tta]
                ]
            logits = torch.stack(parts).sum(dim=0)
            confidence, predicted = logits.softmax(dim=1).max(dim=1)
            losses = functional.cross_entropy(logits, batch.labels, reduction="none")
            new = Outcome(batch.positions, batch.labels, predicted, confidence, losses)
            for kept, values in zip(outcome, new, strict=True):
                kept[counted : counted + len(values)] = values
            counted += len(batch.labels)
        between()
    mine = Outcome(*(values[:counted].cpu() for values in outcome))
    result = summarise(accelerator, mine, classes)
    if result.totals.count != expected:
        raise RuntimeError(f"evaluation counted {result.totals.count} images of {expected}")
    return result


def view(images: torch.Tensor, mirrored: bool, down: int, right: int) -> torch.Tensor:
    """Mirror and shift images, float [N, 3, H, W], and repeat the border."""
    if mirrored:
        images = images.flip(3)
    if not (down or right):
        return images
    reach = max(abs(down), abs(right))
    height, width = images.shape[2:]
    padded = functional.pad(images, [reach] * 4, mode="replicate")
    top, left = reach - down, reach - right
    return padded[:, :, top : top + height, left : left + width]


@torch.no_grad()
def write_buffers(values: torch.Tensor, *networks: nn.Module) -> None:
    """Set the BatchNorm statistics of all networks, float [n], in the order of `gather_buffers`."""
    buffers = _statistics(networks)
    for buffer, part in zip(buffers, values.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def copy_states(values: torch.Tensor, *networks: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Copy the state_dict of each network to the CPU, with other BatchNorm statistics.

    Args:
        values: the statistics of all networks, float [n], in the order of `gather_buffers`.
    """
    copies = []
    for network in networks:
        state = {n: t.detach().to("cpu", copy=True) for n, t in network.state_dict().items()}
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                part, values = values.tensor_split([buffer.numel()])
                if name in state:  # else it is not persistent
                    state[name].copy_(part.view_as(buffer))
        copies.append(state)
    return copies


def gather_buffers(
    accelerator: Accelerator, *networks: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the BatchNorm statistics of every rank, float [ranks, n], and their mean, [n]."""
    buffers = _statistics(networks)
    mine = torch.cat([b.flatten() for b in buffers])[None] if buffers else torch.empty(1, 0)
    rows = accelerator.gather(mine) if len(mine[0]) and accelerator.num_processes > 1 else mine
    # Values that are equal on all ranks are kept, because a mean may be rounded.
    return rows, torch.where((rows == rows[0]).all(dim=0), rows[0], rows.mean(dim=0))


def average_buffers(accelerator: Accelerator, *networks: nn.Module) -> None:
    """Set the BatchNorm statistics of every rank to their mean; every process must call it."""
    if accelerator.num_processes > 1:
        write_buffers(gather_buffers(accelerator, *networks)[1], *networks)


def _statistics(networks: Sequence[nn.Module]) -> list[torch.Tensor]:
    return [b for network in networks for b in network.buffers() if b.is_floating_point()]
