"""A session of a run: everything it works with, built from scratch or from a checkpoint."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import Recipe, differences, local_path
from cifar_dist.data import Dataset
from cifar_dist.data.augment import Pixels
from cifar_dist.errors import RunError, UsageError, one_line, require
from cifar_dist.models.catalogue import build_network
from cifar_dist.processes.peers import Peers
from cifar_dist.speedups import speed_up
from cifar_dist.storage.checkpoint import (
    Best,
    Checkpoint,
    Progress,
    Saver,
    find_checkpoint,
    load_newest,
    pack_optimizer,
    prune,
    save_checkpoint,
    unpack_optimizer,
)
from cifar_dist.storage.folder import MetricsLog, Warned, write_status
from cifar_dist.storage.tracking import Tracker
from cifar_dist.storage.weights import load_weights
from cifar_dist.training.engine import (
    TrainState,
    copy_states,
    gather_buffers,
    settle_buckets,
    write_buffers,
)
from cifar_dist.training.guard import Guard, require_equal_weights
from cifar_dist.training.losses import Loss, build_loss
from cifar_dist.training.metrics import Evaluation, Tally, Totals
from cifar_dist.training.optim import build_optimizer
from cifar_dist.training.schedule import total_steps
from cifar_dist.training.trial import require_batchnorm_values, try_loss, try_network
from cifar_dist.user_code import UserCode, hashes_of, require_same

FIRST_IMAGES = 1000  # passed to `initialise_from` of a network that has it


@dataclass
class Session:
    """One launch of a run.

    Attributes:
        out: run folder.
        beginning: origin of the weights, for the banner; empty if they are random.
        progress: written to the next checkpoint; `save` sets its step, optimizer and scaler.
        equal_at: last step at which all processes were found to have the same weights.
        log: metrics.jsonl; on rank 0 only.
        saver: writes the checkpoints; used on rank 0 only.
        warned: records which parts of logging and tracking have failed.
        clock: start of the training time that the next report covers, in seconds.
    """

    accelerator: Accelerator
    peers: Peers
    recipe: Recipe
    dataset: Dataset
    pixels: Pixels
    out: Path
    state: TrainState
    loss: Loss
    beginning: str
    progress: Progress
    equal_at: int
    log: MetricsLog | None
    tracker: Tracker
    saver: Saver
    warned: Warned
    clock: float

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, without the last incomplete batch."""
        return len(self.dataset.train) // self.recipe.train.batch_size

    def end_of(self, epoch: int) -> int:
        """Return the last step of an epoch; the last epoch of a run may be a fraction."""
        steps = self.steps_per_epoch
        return min((epoch + 1) * steps, total_steps(self.recipe.train.epochs, steps))


def find_start(
    recipe: Recipe, dataset: Dataset, codes: Mapping[str, UserCode]
) -> Checkpoint | None:
    """Load the checkpoint to resume from, or return None to start from scratch. On rank 0.

    1. resume never: none.
    2. resume PATH: that checkpoint, or the newest of that run.
    3. resume auto: the newest in `out` that verifies, if `out` holds any.

    Raises:
        UsageError: the checkpoint is of another recipe or dataset, or all are damaged.
    """
    if recipe.resume == "never":
        return None
    if recipe.resume == "auto":
        found = load_newest(local_path(recipe.out) / "checkpoints") if recipe.out else None
    else:
        found = find_checkpoint(recipe.resume)
    if found is None:
        return None
    path, checkpoint = found
    different = differences(checkpoint.progress.recipe, recipe)
    require(
        not different,
        f"the checkpoint {path} is of another recipe ({'; '.join(different)}); "
        "resume it with the same recipe, or start a new run",
    )
    require(
        checkpoint.progress.dataset == dataset.digest,
        f"the checkpoint {path} was trained on other images than data.root holds now; "
        "restore them, or start a new run with another --out",
    )
    require_same(checkpoint.progress.code, codes, str(path))
    return checkpoint


def open_session(
    accelerator: Accelerator,
    peers: Peers,
    recipe: Recipe,
    dataset: Dataset,
    out: Path,
    start: Checkpoint | None,
    codes: Mapping[str, UserCode],
) -> Session:
    """Build the network and its optimizer from scratch, or restore them from `start`.

    Every process must call it. Only rank 0 logs and tracks.
    """
    if start:
        progress = replace(start.progress, recipe=recipe, code=hashes_of(codes))
    else:
        progress = Progress(
            recipe=recipe,
            classes=list(dataset.classes),
            image_size=dataset.train.image_size,
            mean=list(dataset.mean),
            std=list(dataset.std),
            dataset=dataset.digest,
            code=hashes_of(codes),
        )
    pixels = Pixels(dataset.mean, dataset.std, recipe.augment, recipe.train.seed)
    code = codes.get("model.name")
    torch.manual_seed(recipe.train.seed)
    network = build_network(recipe.model, len(dataset.classes), code).to(accelerator.device)
    side = dataset.train.image_size
    host_read = try_network(
        accelerator, network, recipe.model.name, code, len(dataset.classes), side
    )
    loss = build_loss(recipe.train, codes.get("train.loss"))
    if "train.loss" in codes:
        try_loss(loss, codes["train.loss"], len(dataset.classes), accelerator.device)
    network, beginning = _initialise(accelerator, recipe, network, dataset, pixels, start)
    network, pixels = speed_up(network, pixels)
    average = None
    if recipe.train.ema:
        blend = get_ema_multi_avg_fn(recipe.train.ema)
        average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    optimizer = build_optimizer(network, recipe.optim)
    state = TrainState(
        network=network,
        model=network,
        optimizer=optimizer,
        average=average,
        guard=Guard(optimizer, accelerator.device) if accelerator.scaler is None else None,
        tally=Tally(accelerator.device),
        step=progress.step,
        gradient_norm=torch.zeros(()),
        host_read=host_read,
    )
    if start:
        _restore(start, state, accelerator)
    _prepare(accelerator, state, recipe.train.compile)
    if accelerator.num_processes > 2:
        settle_buckets(state, dataset.train.image_size)
    if start:  # after DDP has made all processes equal to rank 0
        _restore_own(start, state, accelerator)
    warned, is_main = Warned(), accelerator.is_main_process
    return Session(
        accelerator=accelerator,
        peers=peers,
        recipe=recipe,
        dataset=dataset,
        pixels=pixels,
        out=out,
        state=state,
        loss=loss,
        beginning=beginning,
        progress=progress,
        equal_at=progress.step,
        log=MetricsLog(out, progress.step, progress.epoch, warned) if is_main else None,
        tracker=Tracker(accelerator, recipe, out, progress.step, warned),
        saver=Saver(),
        warned=warned,
        clock=time.monotonic(),
    )


def _initialise(
    accelerator: Accelerator,
    recipe: Recipe,
    network: nn.Module,
    dataset: Dataset,
    pixels: Pixels,
    start: Checkpoint | None,
) -> tuple[nn.Module, str]:
    """Set the initial weights; return the network, and the origin of its weights for the banner."""
    beginning = f"continues at step {start.progress.step}" if start else ""
    if recipe.model.weights and not start:
        head_is_new = load_weights(network, recipe.model.weights)
        beginning = f"starts from {recipe.model.weights}" + (", new head" if head_is_new else "")
    # A network may have this method, to set weights from normalised images, float [N, 3, H, W].
    initialise_from = getattr(network, "initialise_from", None)
    if initialise_from is not None and not beginning:
        images = dataset.train
        first = torch.from_numpy(images.images[images.selected[:FIRST_IMAGES]])
        initialise_from(pixels.for_evaluation(first.to(accelerator.device)))
    if recipe.train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if recipe.train.sync_batchnorm:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    per_process = recipe.train.batch_size // recipe.train.accumulate // accelerator.num_processes
    require_batchnorm_values(network, per_process, dataset.train.image_size)
    return network, beginning


def _prepare(accelerator: Accelerator, state: TrainState, compiles: bool) -> None:
    """Set the module and the optimizer that a training step calls."""
    # The compiled module shares its weights with `network`, which is evaluated and saved.
    called = torch.compile(state.network) if compiles else state.network
    # Without device_placement, Accelerate imports torch's sharded tensors to look for them.
    model, optimizer = accelerator.prepare(called, state.optimizer, device_placement=[True, True])
    if accelerator.num_processes > 1:
        # BatchNorm statistics are averaged before an evaluation and a checkpoint, not broadcast at
        # each step. The argument of DDP's constructor changed its name between torch versions.
        model.broadcast_buffers = False
    state.model = model
    if accelerator.scaler is not None:
        state.optimizer = optimizer


def _restore(start: Checkpoint, state: TrainState, accelerator: Accelerator) -> None:
    progress, average, optimizer = start.progress, state.average, state.optimizer
    try:
        state.network.load_state_dict(start.model)
        if average is not None:
            average.module.load_state_dict(start.ema or {})
            average.n_averaged.fill_(progress.step)
        optimizer.load_state_dict(unpack_optimizer(start.optim, progress.optimizer))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = one_line(error, 300)
        raise UsageError(f"the checkpoint does not fit the recipe's model: {reason}") from error
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # safetensors stores no channels-last layout
                values[name] = torch.empty_like(parameter).copy_(value)
    if accelerator.scaler is not None and progress.scaler:
        accelerator.scaler.load_state_dict(progress.scaler)


def _restore_own(start: Checkpoint, state: TrainState, accelerator: Accelerator) -> None:
    """Restore per-rank state.

    If the world size changed, keep the averaged BatchNorm statistics and give rank 0 the sum of the
    metrics.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(start.statistics) == world:
        write_buffers(start.statistics[rank].to(accelerator.device), *state.networks)
    if len(start.tallies) == world:
        state.tally.sums.copy_(start.tallies[rank])
    elif rank == 0:
        state.tally.sums.copy_(start.tallies.sum(dim=0))


def finish_window(session: Session) -> Totals:
    """Return the training loss since the last report, over all ranks; every rank must call it.

    Raises:
        RunError: it is not finite.
    """
    totals = session.state.tally.totals(session.accelerator)
    window = totals.since(Totals(**session.progress.reported))
    session.progress = replace(session.progress, reported=asdict(totals))
    _refuse_non_finite(window, session.state.step)
    return window


def finish_epoch(session: Session, epoch: int, results: Mapping[str, Evaluation]) -> None:
    """Count an epoch as done and compare it with the best; every rank must call it.

    Args:
        results: of evaluating the network after it, by split; empty if that was not due.

    Raises:
        RunError: the training loss is not finite.
    """
    state, progress = session.state, session.progress
    train = state.tally.totals(session.accelerator)
    _refuse_non_finite(train, state.step)
    totals = {"train": train, **{name: result.totals for name, result in results.items()}}
    metrics = {name: line_of(name, epoch, state.step, sums) for name, sums in totals.items()}
    best = progress.best
    if "val" in metrics and metrics["val"]["accuracy"] > best.accuracy:
        best = Best(state.step, metrics["val"]["accuracy"], metrics)
    state.tally.sums.zero_()
    session.progress = replace(
        progress,
        epoch=min(epoch + 1, session.recipe.train.epochs),
        reported={},
        best=best,
        metrics=metrics,
    )


def line_of(split: str, epoch: int, step: int, totals: Totals) -> dict[str, Any]:
    """Return a line of metrics.jsonl, in which epochs are counted from 1."""
    return {
        "split": split,
        "epoch": epoch + 1,
        "step": step,
        "loss": totals.loss,
        "accuracy": totals.accuracy,
        "correct": totals.correct,
        "count": totals.count,
    }


def _refuse_non_finite(totals: Totals, step: int) -> None:
    """With fp16 there is no guard: loss scaling skips a bad step and then tries others."""
    if not math.isfinite(totals.loss_sum):
        raise RunError(
            f"the training loss is {totals.loss_sum} at step {step}; the last checkpoint is from "
            "before it; try a lower optim.lr, a warm-up or train.clip_norm"
        )


def save(session: Session) -> None:
    """Start saving a checkpoint in a thread; every process must call it.

    Everything is copied first, so training can continue. `session.saver` reports failures.

    Raises:
        RunError: the weights of the processes differ; nothing is saved.
    """
    state, accelerator = session.state, session.accelerator
    compare_weights(session)
    statistics, mean = gather_buffers(accelerator, *state.networks)
    tallies = accelerator.gather(state.tally.sums[None])
    if not accelerator.is_main_process:
        return
    session.saver.wait()  # before copying: one copy is memory enough
    optim, plain = pack_optimizer(state.optimizer.state_dict())
    progress = replace(
        session.progress,
        step=state.step,
        optimizer=plain,
        scaler=accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
    )
    # The saved weights contain the mean of all ranks' BatchNorm statistics. Training continues with
    # the statistics of each rank, also after a resume.
    model, *ema = copy_states(mean, *state.networks)
    checkpoint = Checkpoint(
        progress=progress,
        model=model,
        optim={name: value.detach().to("cpu", copy=True) for name, value in optim.items()},
        statistics=statistics.to("cpu", copy=True),
        tallies=tallies.to("cpu", copy=True),
        ema=ema[0] if ema else None,
    )

    def commit() -> None:
        folder = session.out / "checkpoints"
        save_checkpoint(folder, progress.step, checkpoint)
        with session.warned.spare("removing old checkpoints"):
            prune(folder, session.recipe.checkpoint.keep, progress.best.step)
        with session.warned.spare("status.json"):
            write_status(session.out, "running", progress.step, progress.epoch)

    session.saver.start(state.step, commit)


def compare_weights(session: Session) -> None:
    """Check that all processes have the same weights; every process must call it.

    Raises:
        RunError: they differ; names the ranks.
    """
    step = session.state.step
    require_equal_weights(session.accelerator, session.state.network, step, session.equal_at)
    session.equal_at = step
