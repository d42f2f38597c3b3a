"""Reports on a run: banner, metrics.jsonl, trackers and console. None of them changes the run."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator

from cifar_dist.data import Dataset
from cifar_dist.data.augment import augment
from cifar_dist.data.batches import Batch
from cifar_dist.data.listing import HIDDEN, describe, shown
from cifar_dist.processes.start import compiler_of_launcher, describe_device, precision_in_force
from cifar_dist.storage.folder import MetricsLog, describe_run, write_status
from cifar_dist.storage.tracking import (
    CONFUSION_SIDE,
    TILES,
    confusion_picture,
    image_grid,
    wrong_images,
)
from cifar_dist.training.metrics import Evaluation, Totals
from cifar_dist.training.session import Session, line_of
from cifar_dist.user_code import identity

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
    print(
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
        f"{recipe.schedule.name}" + (f"\n  {session.beginning}" if session.beginning else ""),
        flush=True,
    )
    if session.state.host_read and accelerator.device.type == "cuda":
        print(
            f"note: no CUDA graph: {session.state.host_read} reads a tensor's value on the host",
            flush=True,
        )
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
    """Track the network's graph and a grid of augmented training images. On rank 0."""
    dataset, pixels, tracker = session.dataset, session.pixels, session.tracker
    if not tracker.active:
        return
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


@contextmanager
def progress_bar(session: Session, epoch: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on rank 0's terminal; yield a function that advances it by one step."""
    spare = partial(session.warned.spare, "the progress bar")
    bar: Any = None
    with spare():
        if session.accelerator.is_main_process and sys.stderr.isatty():
            from tqdm import tqdm

            bar = tqdm(
                total=session.end_of(epoch) - epoch * session.steps_per_epoch,
                initial=session.state.step % session.steps_per_epoch,
                desc=f"epoch {epoch + 1}/{session.recipe.train.epochs}",
                unit=" steps",
                leave=False,
            )

    def update() -> None:
        if bar is not None:
            with spare():
                bar.update()

    try:
        yield update
    finally:
        if bar is not None:
            with spare():
                bar.close()


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
    session.tracker.scalars({"train_loss": window.loss, **values}, state.step)


def report_epoch(session: Session, epoch: int, results: Mapping[str, Evaluation]) -> None:
    """Record an epoch and the evaluation after it. On rank 0."""
    if session.log is not None:
        _show_epoch(session, session.log, epoch)
        _show_evaluation(session, results)


def _show_epoch(session: Session, log: MetricsLog, epoch: int) -> None:
    """Record the metrics of an epoch, one line per split, and print them as one line."""
    step, lines = session.state.step, session.progress.metrics.values()
    for line in lines:
        log.write(line)
        prefix = "train_epoch" if line["split"] == "train" else line["split"]
        session.tracker.scalars(
            {f"{prefix}_loss": line["loss"], f"{prefix}_accuracy": line["accuracy"]}, step
        )
    print(
        f"epoch {epoch + 1}/{session.recipe.train.epochs}  step {step}  "
        + "  ".join(
            f"{line['split']} loss {line['loss']:.4f} accuracy {line['accuracy']:.4f} "
            f"({line['correct']}/{line['count']})"
            for line in lines
        ),
        flush=True,
    )


def _show_evaluation(session: Session, results: Mapping[str, Evaluation]) -> None:
    """Track per-class accuracy, confusion matrix and misclassified images of each split."""
    step, dataset, tracker = session.state.step, session.dataset, session.tracker
    for name, result in results.items() if tracker.active else ():
        if len(dataset.classes) <= CLASS_SCALARS:
            shares = zip(dataset.classes, result.per_class, strict=True)
            scalars = {f"{name}_class/{kind}": share for kind, share in shares if share == share}
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
