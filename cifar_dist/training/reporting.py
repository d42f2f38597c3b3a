"""Reports on a run: banner, metrics.jsonl, trackers and console. None of them changes the run."""

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from cifar_dist.data import Dataset
from cifar_dist.data.augment import augment
from cifar_dist.data.batches import Batch
from cifar_dist.data.listing import HIDDEN, describe, shown
from cifar_dist.processes.start import compiler_of_launcher, describe_device, precision_in_force
from cifar_dist.processes.streams import fit
from cifar_dist.storage.folder import MetricsLog, describe_run, write_status
from cifar_dist.storage.tracking import (
    CONFUSION_SIDE,
    TILES,
    confusion_picture,
    image_grid,
    wrong_images,
)
from cifar_dist.training.console import loss_name
from cifar_dist.training.metrics import Evaluation, Totals
from cifar_dist.training.session import Session, line_of
from cifar_dist.user_code import identity

TAGS = {  # of TensorBoard and other trackers, by the name in metrics.jsonl
    "learning_rate": "optim/learning_rate",
    "gradient_norm": "optim/gradient_norm",
    "images_per_second": "speed/images_per_second",
    "memory_mb": "speed/memory_mb",
}
CONSTANT_STEPS = 100  # after which a network that has learned nothing is reported
CLASS_SCALARS = 100  # classes up to which the accuracy of each is tracked


def announce(session: Session, origin: str) -> None:
    """Print the banner and write run.json and status.json. On rank 0."""
    if not session.accelerator.is_main_process:
        return
    recipe, dataset, accelerator = session.recipe, session.dataset, session.accelerator
    world = accelerator.num_processes
    backend = torch.distributed.get_backend() if world > 1 else "none"
    precision, compiler = precision_in_force(accelerator), compiler_of_launcher(accelerator)
    facts = {
        "world_size": world,
        "device": describe_device(accelerator.device),
        "backend": backend,
        "precision": precision,
        "dynamo_backend": compiler,
        "threads": torch.get_num_threads(),
        "classes": dataset.classes,
        "train_images": len(dataset.train),
        "evaluation_images": {name: len(part) for name, part in dataset.evaluation.items()},
        "skipped_images": dataset.skipped,
        "left_out_files": dataset.left_out,
        "identical_images": {
            name: part.identical_to(dataset.train) for name, part in dataset.evaluation.items()
        },
        "dataset_sha256": dataset.digest,
        "steps_per_epoch": session.steps_per_epoch,
    }
    per_process = recipe.train.batch_size // recipe.train.accumulate // world
    compiled = f", compiled by the launcher's dynamo_backend {compiler}" if compiler else ""
    parts = f" in {recipe.train.accumulate} micro-batches" if recipe.train.accumulate > 1 else ""
    dropped = len(dataset.train) - session.steps_per_epoch * recipe.train.batch_size
    banner = (
        f"cifar_dist: {origin}; out {session.out}\n"
        f"  {world} {'process' if world == 1 else 'processes'} on {facts['device']}, backend "
        f"{backend}, precision {precision}{compiled}, {facts['threads']} threads each\n"
        f"  {identity(recipe.model.name)} on {recipe.data.name}: "
        f"{len(dataset.train)} training images, "
        + ", ".join(f"{count} {name}" for name, count in facts["evaluation_images"].items())
        + f", {len(dataset.classes)} classes\n"
        f"  classes {_first(dataset.classes)}\n"
        f"  batch {recipe.train.batch_size}{parts}, {per_process} per process; "
        f"{session.steps_per_epoch} steps per epoch ({dropped} images dropped), "
        f"{recipe.train.epochs} epochs; {recipe.optim.name} {recipe.optim.lr} "
        f"{recipe.schedule.name}" + (f"\n  {session.beginning}" if session.beginning else "")
    )
    print(fit(banner), flush=True)
    if session.state.host_read and accelerator.device.type == "cuda":
        print(
            f"note: no CUDA graph: {session.state.host_read} reads a tensor's value on the host",
            flush=True,
        )
    if world == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        print(f"note: 1 of {count} GPUs is used; --processes auto uses all", flush=True)
    for reason in dataset.skipped:
        print(f"warning: left out, cannot be decoded: {reason}", flush=True)
    _warn_of_images(dataset, facts["identical_images"])
    with session.warned.spare("run.json"):
        describe_run(session.out, facts, session.state.step)
    with session.warned.spare("status.json"):
        write_status(session.out, "running", session.state.step, session.progress.epoch)


def _warn_of_images(dataset: Dataset, identical: Mapping[str, int]) -> None:
    """Print which files were left out and what makes the accuracy doubtful."""
    for line in describe(dataset.left_out):
        usual = line.startswith(HIDDEN)
        print(f"{'note' if usual else 'warning'}: left out, {line}", flush=True)
    for name, images in {"train": dataset.train, **dataset.evaluation}.items():
        absent = images.absent_classes()
        if absent:
            print(f"warning: {name} has no image of {_first(absent)}", flush=True)
    for name, count in identical.items():
        if count:
            print(
                f"warning: {count} of {len(dataset.evaluation[name])} {name} images are identical "
                f"to training images; the {name} accuracy is too high by them",
                flush=True,
            )


def _first(names: Sequence[str], most: int = 10) -> str:
    """Return the first `most` names in one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def show_inputs(session: Session) -> None:
    """Track the network's graph and a grid of augmented training images. On rank 0.

    Also lays out the charts that show the curves of all splits together.
    """
    dataset, pixels, tracker = session.dataset, session.pixels, session.tracker
    if not tracker.active:
        return
    splits = ("train", *dataset.evaluation)
    tracker.charts(
        {what: [_tag(what, name, session) for name in splits] for what in ("accuracy", "loss")}
    )
    positions = np.arange(len(dataset.train))[:: max(1, len(dataset.train) // TILES)][:TILES]
    rows = dataset.train.selected[positions]
    batch = Batch(
        torch.from_numpy(np.asarray(dataset.train.images[rows])),
        torch.from_numpy(dataset.train.labels[rows]),
        torch.from_numpy(positions),
    )

    def draw() -> np.ndarray:
        images, hole = augment(batch, pixels.augment, pixels.seed, 0)
        shown = images if hole is None else images.masked_fill(hole, 127)
        return image_grid(shown.numpy())

    tracker.picture("train_images", draw, 0)
    device = session.accelerator.device
    tracker.graph(session.state.network, pixels.for_evaluation(batch.images[:1]).to(device))


def report_window(session: Session, epoch: int, window: Totals) -> None:
    """Record the training loss since the last report. On rank 0."""
    if session.log is None:
        return
    state = session.state
    seconds, session.clock = time.monotonic() - session.clock, time.monotonic()
    values = {
        "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
        "gradient_norm": state.gradient_norm.item(),
        "images_per_second": window.count / seconds,
    }
    with session.warned.spare("reading the memory in use"):
        values["memory_mb"] = _memory_used(session.accelerator)
    session.log.write(line_of("train_window", epoch, state.step, window) | values)
    tags = {TAGS[name]: value for name, value in values.items()}
    tags |= {f"{_tag('loss', 'train', session)}_window": window.loss}
    tags |= {"progress/epoch": state.step / session.steps_per_epoch}
    session.tracker.scalars(tags, state.step)


def report_epoch(session: Session, results: Mapping[str, Evaluation]) -> None:
    """Record an epoch and the evaluation after it. On rank 0."""
    if session.log is not None:
        _track_epoch(session, session.log)
        _warn_of_constant_output(session, results)
        _show_evaluation(session, results)


def _track_epoch(session: Session, log: MetricsLog) -> None:
    """Record the metrics of an epoch, one line per split."""
    for name, line in session.progress.metrics.items():
        log.write(line)
        tags = {_tag(what, name, session): line[what] for what in ("accuracy", "loss")}
        session.tracker.scalars(tags, session.state.step)


def _warn_of_constant_output(session: Session, results: Mapping[str, Evaluation]) -> None:
    """Warn of a network that has learned nothing: one answer for all images, with the loss of it.

    Checked once after CONSTANT_STEPS steps, to spare slow starts, and at the end of the run.
    """
    step = session.state.step
    last = step == session.end_of(math.ceil(session.recipe.train.epochs) - 1)
    first = step - session.steps_per_epoch < CONSTANT_STEPS <= step
    for name, result in results.items() if first or last else ():
        chance = math.log(result.classes)
        constant = len(set(result.pairs[:, 1].tolist())) == 1 < result.classes
        if constant and abs(result.totals.loss / chance - 1) < 0.02:
            print(
                f"warning: the network gives one class for all {name} images, and its loss "
                f"{result.totals.loss:.4f} is that of guessing (ln {result.classes} = "
                f"{chance:.4f}); usual causes: a learning rate that is too high or too low "
                f"(optim.lr is {session.recipe.optim.lr:g}), images without contrast, or labels "
                "that do not belong to the images",
                flush=True,
            )


def _tag(what: str, split: str, session: Session) -> str:
    """Return the tag of "accuracy" or "loss" of a split.

    A training loss that is not comparable with the loss of an evaluation has its own name.
    """
    name = loss_name(session) if (what, split) == ("loss", "train") else what
    return f"{what}/{split}" + ("" if name == what else f"_{name.replace(' ', '_')}")


def _show_evaluation(session: Session, results: Mapping[str, Evaluation]) -> None:
    """Track per-class accuracy, confusion matrix and misclassified images of each split."""
    step, dataset, tracker = session.state.step, session.dataset, session.tracker
    for name, result in results.items() if tracker.active else ():
        if len(dataset.classes) <= CLASS_SCALARS:
            shares = zip(dataset.classes, result.per_class, strict=True)
            scalars = {f"per_class/{name}_{kind}": s for kind, s in shares if s == s}
            tracker.scalars(scalars, step)
        tracker.picture(f"{name}_confusion", partial(draw_confusion, result, dataset.classes), step)
        images = dataset.evaluation[name]
        tracker.picture(f"{name}_wrong", partial(wrong_images, images, result.wrong), step)


def draw_confusion(result: Evaluation, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix; above CONFUSION_SIDE classes, neighbouring classes share a row."""
    return confusion_picture(result.coarse_confusion(CONFUSION_SIDE), classes)


def _memory_used(accelerator: Accelerator) -> float:
    """Return the peak of allocated GPU memory, or the resident memory on a CPU, in megabytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6
