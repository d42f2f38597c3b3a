"""A session of a run: everything it works with, built anew or as a checkpoint holds it."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import Recipe, differences, from_dict, local_path, to_dict
from cifar_dist.data import Dataset
from cifar_dist.data.augment import Pixels
from cifar_dist.errors import UsageError, require
from cifar_dist.models.catalogue import build_network
from cifar_dist.processes.peers import Peers
from cifar_dist.speedups import speed_up
from cifar_dist.storage.checkpoint import (
    Checkpoint,
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
from cifar_dist.training.engine import TrainState, gather_buffers, settle_buckets, write_buffers
from cifar_dist.training.guard import Guard, require_equal_weights
from cifar_dist.training.losses import Loss, build_loss
from cifar_dist.training.metrics import Tally, Totals
from cifar_dist.training.optim import build_optimizer
from cifar_dist.training.schedule import total_steps
from cifar_dist.training.trial import require_batchnorm_values, try_loss, try_network
from cifar_dist.user_code import UserCode, hashes_of, require_same

FIRST_IMAGES = 1000  # that a network with `initialise_from` gets


@dataclass
class Session:
    """One start of a run, from its launch to its end.

    Attributes:
        out: run folder.
        codes: the user's own, by the recipe key that names it.
        beginning: where the weights come from, for the banner; empty if they are new.
        epochs_done: epochs trained and measured; the last may be a part of one.
        equal_at: step at which all processes had the same weights, as far as was looked.
        reported: sums of this epoch when the training loss was recorded last.
        best: {"step", "accuracy", "metrics"} of the best epoch by validation; step None: none yet.
        metrics: lines of the last evaluation, by split.
        log: on rank 0 only.
        saver: on rank 0 it writes the checkpoints.
        warned: what only observes, and has failed.
        clock: when the training time of the next report began, in seconds.
    """

    accelerator: Accelerator
    peers: Peers
    recipe: Recipe
    dataset: Dataset
    pixels: Pixels
    out: Path
    state: TrainState
    loss: Loss
    codes: Mapping[str, UserCode]
    beginning: str
    epochs_done: float
    equal_at: int
    reported: Totals
    best: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    log: MetricsLog | None
    tracker: Tracker
    saver: Saver
    warned: Warned
    clock: float

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; images that fill no batch are left over."""
        return len(self.dataset.train) // self.recipe.train.batch_size

    def end_of(self, epoch: int) -> int:
        """Return the step with which an epoch ends; the run may end in the middle of its last."""
        steps = self.steps_per_epoch
        return min((epoch + 1) * steps, total_steps(self.recipe.train.epochs, steps))


def find_start(
    recipe: Recipe, dataset: Dataset, codes: Mapping[str, UserCode]
) -> Checkpoint | None:
    """Load the checkpoint to continue from; None starts anew. On rank 0.

    1. resume never: none.
    2. resume PATH: that checkpoint, or the newest of that run.
    3. resume auto: the newest in `out` that verifies, if `out` holds any.

    Raises:
        UsageError: the checkpoint is of another recipe, dataset or model, or all are damaged.
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
    different = differences(from_dict(checkpoint.state["recipe"]), recipe)
    require(
        not different,
        f"the checkpoint {path} is of another recipe ({'; '.join(different)}); "
        "continue it with the same, or start a new run",
    )
    require(
        checkpoint.state["dataset"] == dataset.digest,
        f"the checkpoint {path} was trained on other images than data.root holds now; "
        "restore them, or start a new run with another --out",
    )
    require_same(checkpoint.state.get("code", {}), codes, str(path))
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
    """Build the network and its optimizer, as new or as they were at `start`.

    Every process does the same; rank 0 alone logs and tracks.
    """
    saved = start.state if start else {}
    torch.manual_seed(recipe.train.seed)
    classes = len(dataset.classes)
    network_code, loss_code = codes.get("model.name"), codes.get("train.loss")
    network = build_network(recipe.model, classes, network_code).to(accelerator.device)
    host_read = try_network(
        accelerator,
        network,
        recipe.model.name,
        network_code,
        classes,
        dataset.train.image_size,
    )
    loss = build_loss(recipe.train, loss_code)
    if loss_code:
        try_loss(loss, loss_code, classes, accelerator.device)
    beginning = f"continues at step {start.state['step']}" if start else ""
    if recipe.model.weights and not start:
        head_is_new = load_weights(network, recipe.model.weights)
        beginning = f"starts from {recipe.model.weights}" + (", new head" if head_is_new else "")
    pixels = Pixels(dataset.mean, dataset.std, recipe.augment, recipe.train.seed)
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
    network, pixels = speed_up(network, pixels)
    average = None
    if recipe.train.ema:
        blend = get_ema_multi_avg_fn(recipe.train.ema)
        average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    optimizer = build_optimizer(network, recipe.optim)
    guard = Guard(optimizer, accelerator.device) if accelerator.scaler is None else None
    if start:
        _restore(start, network, average, optimizer, accelerator)
    # What is compiled shares all weights with the network, which is what is measured and saved.
    called = torch.compile(network) if recipe.train.compile else network
    # Not told where they go, Accelerate imports torch's sharded tensors to see that there are none.
    model, prepared = accelerator.prepare(called, optimizer, device_placement=[True, True])
    if accelerator.scaler is not None:
        optimizer = prepared
    if accelerator.num_processes > 1:
        # BatchNorm statistics are averaged where they are used, not sent round at each step. Set
        # here because the constructor's argument changed its name between torch versions.
        model.broadcast_buffers = False
    tally, step = Tally(accelerator.device), saved.get("step", 0)
    state = TrainState(network, model, optimizer, average, guard, tally, step, torch.zeros(()))
    state.host_read = host_read
    if accelerator.num_processes > 2:
        settle_buckets(state, dataset.train.image_size)
    if start:  # after DDP has made all processes equal to rank 0
        _restore_own(start, network, average, tally, accelerator)
    epochs_done, warned = saved.get("epoch", 0), Warned()
    is_main = accelerator.is_main_process
    return Session(
        accelerator=accelerator,
        peers=peers,
        recipe=recipe,
        dataset=dataset,
        pixels=pixels,
        out=out,
        state=state,
        loss=loss,
        codes=codes,
        beginning=beginning,
        epochs_done=epochs_done,
        equal_at=step,
        reported=Totals(**saved.get("reported", {})),
        best=saved.get("best", {"step": None, "accuracy": -1.0, "metrics": {}}),
        metrics=saved.get("metrics", {}),
        log=MetricsLog(out, step, epochs_done, warned) if is_main else None,
        tracker=Tracker(accelerator, recipe, out, step, warned),
        saver=Saver(),
        warned=warned,
        clock=time.monotonic(),
    )


def _restore(
    start: Checkpoint,
    network: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> None:
    saved = start.state
    try:
        network.load_state_dict(start.tensors["model"])
        if average is not None:
            average.module.load_state_dict(start.tensors["ema"])
            average.n_averaged.fill_(saved["step"])
        optimizer.load_state_dict(unpack_optimizer(start.tensors["optim"], saved["optimizer"]))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the checkpoint does not fit the recipe's model: {reason}") from error
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value.shape == parameter.shape:  # files know no channels-last layout
                values[name] = torch.empty_like(parameter).copy_(value)
    if accelerator.scaler is not None and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])


def _restore_own(
    start: Checkpoint,
    network: nn.Module,
    average: AveragedModel | None,
    tally: Tally,
    accelerator: Accelerator,
) -> None:
    """Give each process what it had for itself; another number of them, the mean and the sum."""
    statistics, tallies = (start.tensors["processes"][name] for name in ("statistics", "tallies"))
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(statistics) == world:
        write_buffers(statistics[rank].to(accelerator.device), network, average)
    if len(tallies) == world:
        tally.sums.copy_(tallies[rank])
    elif rank == 0:
        tally.sums.copy_(tallies.sum(dim=0))


def save(session: Session) -> None:
    """Start to save a checkpoint; every process must call it.

    Everything is copied first, so training may go on; `session.saver` says how it ended.

    Raises:
        RunError: the processes no longer have the same weights; nothing is saved.
    """
    state, accelerator = session.state, session.accelerator
    compare_weights(session)
    networks = (state.network, state.average)
    rows, mean = gather_buffers(accelerator, *networks)
    tallies = accelerator.gather(state.tally.sums[None])
    if not accelerator.is_main_process:
        return
    session.saver.wait()  # before copying: one copy is memory enough
    optim, plain = pack_optimizer(state.optimizer.state_dict())
    # The weights are written with the mean of all processes' statistics, and each process's own
    # beside them: training goes on with those, here as after a resume.
    write_buffers(mean, *networks)
    tensors = {
        "model": state.network.state_dict(),
        "optim": optim,
        "processes": {"statistics": rows, "tallies": tallies},
    }
    if state.average is not None:
        tensors["ema"] = state.average.module.state_dict()
    copies = {
        part: {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
        for part, values in tensors.items()
    }
    write_buffers(rows[0], *networks)
    facts = {
        "step": state.step,
        "epoch": session.epochs_done,
        "reported": dataclasses.asdict(session.reported),
        "best": session.best,
        "metrics": session.metrics,
        "recipe": to_dict(session.recipe),
        "classes": session.dataset.classes,
        "image_size": session.dataset.train.image_size,
        "mean": session.dataset.mean,
        "std": session.dataset.std,
        "dataset": session.dataset.digest,
        "optimizer": plain,
        "code": hashes_of(session.codes),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
    }
    folder, step, epoch = session.out / "checkpoints", state.step, session.epochs_done
    keep, best = session.recipe.checkpoint.keep, session.best["step"]

    def commit() -> None:
        save_checkpoint(folder, step, Checkpoint(copies, facts))
        with session.warned.spare("removing old checkpoints"):
            prune(folder, keep, best)
        with session.warned.spare("status.json"):
            write_status(session.out, "running", step, epoch)

    session.saver.start(step, commit)


def compare_weights(session: Session) -> None:
    """Make sure that all processes have the same weights; every process must call it.

    Raises:
        RunError: naming the ranks that drifted.
    """
    step = session.state.step
    require_equal_weights(session.accelerator, session.state.network, step, session.equal_at)
    session.equal_at = step
