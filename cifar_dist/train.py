"""Train a recipe: `accelerate launch -m cifar_dist.train [--config RECIPE] [--section.key value]`.

The story of a run, from top to bottom: processes, data, network, where to continue, epochs, result.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import (
    Recipe,
    UsageError,
    differences,
    from_dict,
    nearest_multiples,
    parse_recipe,
    require,
    to_dict,
)
from cifar_dist.runtime import leave_processes, run_verb

if TYPE_CHECKING:
    from accelerate import Accelerator

    from cifar_dist.checkpoint import Checkpoint
    from cifar_dist.data import Dataset
    from cifar_dist.data.augment import Pixels
    from cifar_dist.engine import TrainState
    from cifar_dist.metrics import Totals
    from cifar_dist.runfolder import MetricsLog
    from cifar_dist.tracking import Tracker


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        state: finished.
        out: run folder.
        metrics: of the last epoch: one entry a split, with loss, accuracy, correct and count.
        best: the same of the epoch with the best validation accuracy; None without validation.
    """

    state: str
    out: Path
    metrics: dict[str, dict[str, Any]]
    best: dict[str, Any] | None


@dataclass
class Run:
    """Everything that belongs to a run while it lasts."""

    accelerator: Accelerator
    recipe: Recipe
    dataset: Dataset
    pixels: Pixels
    out: Path
    steps_per_epoch: int
    state: TrainState
    reported: Totals  # of this epoch, when the training loss was recorded last
    best: dict[str, Any]  # {"step", "accuracy", "metrics"}; step is None before the first
    metrics: dict[str, dict[str, Any]]  # of the last evaluation, by split
    log: MetricsLog | None  # rank 0 only
    tracker: Tracker
    clock: float  # when the training time of the next report began


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        recipe, origin = parse_recipe(arguments)
        from torch.distributed.elastic.multiprocessing.errors import record

        record(run)(recipe, origin)  # a crash is then named in the launcher's last lines
        leave_processes()
        return 0

    return run_verb(verb, argv)


def run(recipe: Recipe, origin: str = "Python") -> Result:
    """Train `recipe`, or continue the run of it that its `out` holds.

    Args:
        recipe: what to do; every process gets the same.
        origin: where the recipe came from, for the banner.

    Raises:
        UsageError: the request cannot work; nothing was started.
    """
    from cifar_dist.data import load_dataset
    from cifar_dist.runfolder import check_out, claim, write_status
    from cifar_dist.runtime import on_main_process, start_processes

    accelerator = start_processes(recipe.train, recipe.track.log_with)
    _check_batch_size(recipe, accelerator.num_processes)
    on_main_process(accelerator, lambda: check_out(recipe))
    dataset = load_dataset(recipe.data)
    _check_dataset(recipe, dataset)
    start = on_main_process(accelerator, lambda: _find_start(recipe, dataset))
    out = on_main_process(accelerator, lambda: claim(recipe))
    run = _prepare(accelerator, recipe, dataset, out, start)
    _announce(run, origin)
    try:
        _train(run)
    except BaseException as error:
        if accelerator.is_main_process:
            reason = f"{type(error).__name__}: {error}"
            write_status(out, "failed", run.state.step, _epoch(run), reason)
        raise
    return _finish(run)


def _train(run: Run) -> None:
    """Train the epochs that are left."""
    from cifar_dist.data.batches import build_evaluation_loader, build_loader
    from cifar_dist.engine import train_epoch
    from cifar_dist.schedule import learning_rate

    recipe, state, steps = run.recipe, run.state, run.steps_per_epoch
    train = recipe.train
    loader, order = build_loader(
        run.accelerator, run.dataset.train, train.batch_size // train.accumulate, train.seed
    )
    evaluation = {
        name: build_evaluation_loader(run.accelerator, images)
        for name, images in run.dataset.evaluation.items()
    }

    def schedule(step: int) -> float:
        return learning_rate(recipe.schedule, recipe.optim.lr, step, steps, train.epochs)

    for epoch in range(_epoch(run), train.epochs):
        order.start_at(epoch, state.step % steps * train.accumulate)
        bar = _progress_bar(run, epoch)
        run.clock = time.monotonic()
        for _ in train_epoch(
            run.accelerator, state, loader, run.pixels, train, schedule, epoch
        ):
            bar.update()
            if recipe.track.every_steps and state.step % recipe.track.every_steps == 0:
                _report_window(run, epoch)
            within = state.step % steps != 0  # an epoch's last step is saved after evaluation
            if within and _due(recipe.checkpoint.every_steps, state.step):
                _save(run)
        bar.close()
        _report_epoch(run, epoch, evaluation)
        if (
            epoch + 1 == train.epochs
            or _due(recipe.checkpoint.every_epochs, epoch + 1)
            or _due(recipe.checkpoint.every_steps, state.step)
        ):
            _save(run)


def _prepare(
    accelerator: Accelerator, recipe: Recipe, dataset: Dataset, out: Path, start: Checkpoint | None
) -> Run:
    """Build the network and its optimizer, as new or as they were at `start`."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from cifar_dist.checkpoint import unpack_optimizer
    from cifar_dist.data.augment import Pixels
    from cifar_dist.engine import TrainState
    from cifar_dist.metrics import Tally, Totals
    from cifar_dist.models import build_model
    from cifar_dist.optim import build_optimizer
    from cifar_dist.runfolder import MetricsLog
    from cifar_dist.tracking import Tracker

    saved = start.state if start else {}
    torch.manual_seed(recipe.train.seed)
    network = build_model(recipe.model, len(dataset.classes)).to(accelerator.device)
    if recipe.train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if recipe.train.sync_batchnorm:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    average = None
    if recipe.train.ema:
        blend = get_ema_multi_avg_fn(recipe.train.ema)
        average = AveragedModel(network, multi_avg_fn=blend, use_buffers=True)
    optimizer = build_optimizer(network, recipe.optim)
    if start:
        network.load_state_dict(start.tensors["model"])
        if average is not None:
            average.module.load_state_dict(start.tensors["ema"])
            average.n_averaged.fill_(saved["step"])
        optimizer.load_state_dict(unpack_optimizer(start.tensors["optim"], saved["optimizer"]))
        for parameter, values in optimizer.state.items():  # in the parameter's memory layout
            for name, value in values.items():
                if value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        if accelerator.scaler is not None and saved["scaler"]:
            accelerator.scaler.load_state_dict(saved["scaler"])
    step = saved.get("step", 0)
    tracker = Tracker(accelerator, recipe, out, step)
    pixels = Pixels(dataset.mean, dataset.std, recipe.augment, recipe.train.seed)
    if not start and accelerator.is_main_process:
        _show_inputs(tracker, network, dataset, pixels)
    model, optimizer = accelerator.prepare(network, optimizer)
    if accelerator.num_processes > 1:
        # BatchNorm statistics are averaged where they are used, not sent round at each step. Set
        # here because the constructor's argument changed its name between torch versions.
        model.broadcast_buffers = False
    tally = Tally(accelerator.device)
    tally.restart(Totals(**saved.get("totals", {})), accelerator)
    return Run(
        accelerator=accelerator,
        recipe=recipe,
        dataset=dataset,
        pixels=pixels,
        out=out,
        steps_per_epoch=len(dataset.train) // recipe.train.batch_size,
        state=TrainState(network, model, optimizer, average, tally, step),
        reported=Totals(**saved.get("reported", {})),
        best=saved.get("best", {"step": None, "accuracy": -1.0, "metrics": {}}),
        metrics=saved.get("metrics", {}),
        log=MetricsLog(out, step) if accelerator.is_main_process else None,
        tracker=tracker,
        clock=time.monotonic(),
    )


def _find_start(recipe: Recipe, dataset: Dataset) -> Checkpoint | None:
    """Load the checkpoint to continue from; None starts anew. On rank 0.

    1. resume never: none.
    2. resume PATH: that checkpoint, or the newest of that run.
    3. resume auto: the newest in `out` that verifies, if `out` holds any.

    Raises:
        UsageError: the checkpoint is of another recipe, dataset or model, or all are damaged.
    """
    from cifar_dist.checkpoint import find_checkpoint, load_newest

    if recipe.resume == "never":
        return None
    if recipe.resume == "auto":
        found = load_newest(Path(recipe.out).expanduser() / "checkpoints") if recipe.out else None
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
    return checkpoint


def _save(run: Run) -> None:
    """Commit a checkpoint of this step and remove those no longer wanted."""
    from cifar_dist.checkpoint import Checkpoint, pack_optimizer, prune, save_checkpoint
    from cifar_dist.engine import average_buffers
    from cifar_dist.runfolder import write_status

    state, accelerator = run.state, run.accelerator
    average_buffers(accelerator, state.network, state.average)
    totals = state.tally.totals(accelerator)
    # Rank 0 carries on with the sum, here and after a resume: the same additions in both.
    state.tally.restart(totals, accelerator)
    if not accelerator.is_main_process:
        return
    optim, plain = pack_optimizer(state.optimizer.state_dict())
    tensors = {"model": state.network.state_dict(), "optim": optim}
    if state.average is not None:
        tensors["ema"] = state.average.module.state_dict()
    facts = {
        "step": state.step,
        "epoch": _epoch(run),
        "totals": dataclasses.asdict(totals),
        "reported": dataclasses.asdict(run.reported),
        "best": run.best,
        "metrics": run.metrics,
        "recipe": to_dict(run.recipe),
        "classes": run.dataset.classes,
        "image_size": run.dataset.train.image_size,
        "mean": run.dataset.mean,
        "std": run.dataset.std,
        "dataset": run.dataset.digest,
        "optimizer": plain,
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
    }
    folder = run.out / "checkpoints"
    save_checkpoint(folder, state.step, Checkpoint(tensors, facts))
    prune(folder, run.recipe.checkpoint.keep, run.best["step"])
    write_status(run.out, "running", state.step, _epoch(run))


def _report_window(run: Run, epoch: int) -> None:
    """Record the training loss since the report before; every process must call it."""
    from torch.nn.utils import get_total_norm

    state = run.state
    totals = state.tally.totals(run.accelerator)
    window, run.reported = totals.since(run.reported), totals
    seconds, run.clock = time.monotonic() - run.clock, time.monotonic()
    _refuse_non_finite(window, state.step)
    gradients = [p.grad for p in state.network.parameters() if p.grad is not None]
    values = {
        "learning_rate": state.optimizer.param_groups[0]["lr"],
        "gradient_norm": get_total_norm(gradients).item(),
        "images_per_second": window.count / seconds,
        "memory_mb": _memory_used(run.accelerator),
    }
    if run.log:
        run.log.write(_line("train_window", epoch, state.step, window) | values)
        run.tracker.scalars({"train_loss": window.loss, **values}, state.step)


def _report_epoch(run: Run, epoch: int, evaluation: dict[str, Any]) -> None:
    """Measure after an epoch, record everything and keep track of the best."""
    from cifar_dist.engine import average_buffers, evaluate
    from cifar_dist.metrics import Totals

    state, accelerator = run.state, run.accelerator
    train = state.tally.totals(accelerator)
    _refuse_non_finite(train, state.step)
    average_buffers(accelerator, state.network, state.average)
    results = {
        name: evaluate(
            accelerator, state.evaluated, loader, run.pixels, len(run.dataset.classes)
        )
        for name, loader in evaluation.items()
    }
    lines = [_line("train", epoch, state.step, train)]
    lines += [_line(name, epoch, state.step, result.totals) for name, result in results.items()]
    run.metrics = {line["split"]: line for line in lines}
    if "val" in results and run.metrics["val"]["accuracy"] > run.best["accuracy"]:
        accuracy = run.metrics["val"]["accuracy"]
        run.best = {"step": state.step, "accuracy": accuracy, "metrics": run.metrics}
    state.tally.restart(Totals(), accelerator)
    run.reported = Totals()
    if run.log is None:
        return
    for line in lines:
        run.log.write(line)
        prefix = "train_epoch" if line["split"] == "train" else line["split"]
        run.tracker.scalars(
            {f"{prefix}_loss": line["loss"], f"{prefix}_accuracy": line["accuracy"]}, state.step
        )
    _show_evaluation(run, results)
    print(
        f"epoch {epoch + 1}/{run.recipe.train.epochs}  step {state.step}  "
        + "  ".join(
            f"{line['split']} loss {line['loss']:.4f} accuracy {line['accuracy']:.4f} "
            f"({line['correct']}/{line['count']})"
            for line in lines
        ),
        flush=True,
    )


def _finish(run: Run) -> Result:
    from cifar_dist.runfolder import write_status

    run.tracker.finish()
    best = run.best["metrics"] if run.best["step"] is not None else None
    if run.accelerator.is_main_process:
        write_status(run.out, "finished", run.state.step, _epoch(run))
        if best:
            numbers = ", ".join(
                f"{name} {line['accuracy']:.4f}" for name, line in best.items() if name != "train"
            )
            print(f"best by validation: step {run.best['step']}, accuracy {numbers}")
        print(f"finished: {run.out}", flush=True)
    run.accelerator.wait_for_everyone()
    return Result("finished", run.out, run.metrics, best)


def _announce(run: Run, origin: str) -> None:
    """Print the banner and write run.json and status.json. On rank 0."""
    from cifar_dist.runfolder import describe_run, write_status
    from cifar_dist.runtime import describe_device, precision_in_force

    if not run.accelerator.is_main_process:
        return
    import torch

    recipe, accelerator, world = run.recipe, run.accelerator, run.accelerator.num_processes
    backend = torch.distributed.get_backend() if world > 1 else "none"
    precision = precision_in_force(accelerator)
    facts = {
        "world_size": world,
        "device": describe_device(accelerator.device),
        "backend": backend,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "classes": run.dataset.classes,
        "train_images": len(run.dataset.train),
        "evaluation_images": {name: len(part) for name, part in run.dataset.evaluation.items()},
        "skipped_images": run.dataset.skipped,
        "dataset_sha256": run.dataset.digest,
        "steps_per_epoch": run.steps_per_epoch,
    }
    per_process = recipe.train.batch_size // recipe.train.accumulate // world
    parts = f" in {recipe.train.accumulate} parts" if recipe.train.accumulate > 1 else ""
    dropped = len(run.dataset.train) - run.steps_per_epoch * recipe.train.batch_size
    print(
        f"cifar_dist: {origin}; out {run.out}\n"
        f"  {world} {'process' if world == 1 else 'processes'} on {facts['device']}, backend "
        f"{backend}, precision {precision}, {facts['threads']} threads each\n"
        f"  {recipe.model.name} on {recipe.data.name}: {len(run.dataset.train)} training images, "
        + ", ".join(f"{count} {name}" for name, count in facts["evaluation_images"].items())
        + f", {len(run.dataset.classes)} classes\n"
        f"  batch {recipe.train.batch_size}{parts}, {per_process} per process; "
        f"{run.steps_per_epoch} steps per epoch ({dropped} images left over), "
        f"{recipe.train.epochs} epochs; {recipe.optim.name} {recipe.optim.lr} "
        f"{recipe.schedule.name}"
        + (f"\n  continues at step {run.state.step}" if run.state.step else ""),
        flush=True,
    )
    for reason in run.dataset.skipped:
        print(f"warning: left out, cannot be decoded: {reason}", flush=True)
    describe_run(run.out, facts, run.state.step)
    write_status(run.out, "running", run.state.step, _epoch(run))


def _show_inputs(tracker: Tracker, network: Any, dataset: Dataset, pixels: Pixels) -> None:
    """Track the network's graph and a grid of training images as the network will see them."""
    import numpy as np
    import torch

    from cifar_dist.data.augment import augment
    from cifar_dist.data.batches import Batch
    from cifar_dist.tracking import TILES, image_grid

    positions = np.arange(len(dataset.train))[:: max(1, len(dataset.train) // TILES)][:TILES]
    rows = dataset.train.selected[positions]
    batch = Batch(
        torch.from_numpy(np.asarray(dataset.train.images[rows])),
        torch.from_numpy(dataset.train.labels[rows]),
        torch.from_numpy(positions),
    )
    images, hole = augment(batch, pixels.augment, pixels.seed, 0)
    shown = images if hole is None else images.masked_fill(hole, 127)
    tracker.picture("train_images", image_grid(shown.numpy()), 0)
    device = next(network.parameters()).device
    tracker.graph(network, pixels.for_evaluation(batch.images[:1]).to(device))


def _show_evaluation(run: Run, results: dict[str, Any]) -> None:
    """Track per-class accuracy, the confusion matrix and some wrong images of each split."""
    from cifar_dist.tracking import confusion_picture, wrong_images

    step, classes = run.state.step, run.dataset.classes
    for name, result in results.items():
        shares = zip(classes, result.per_class, strict=True)
        scalars = {f"{name}_class/{kind}": share for kind, share in shares if share == share}
        run.tracker.scalars(scalars, step)
        run.tracker.picture(
            f"{name}_confusion", confusion_picture(result.confusion, classes), step
        )
        picture = wrong_images(run.dataset.evaluation[name], result.wrong)
        if picture is not None:
            run.tracker.picture(f"{name}_wrong", picture, step)


def _check_batch_size(recipe: Recipe, world: int) -> None:
    size, parts = recipe.train.batch_size, world * recipe.train.accumulate
    require(
        size % parts == 0,
        f"train.batch_size {size} does not divide among {world} processes"
        + (f" x {recipe.train.accumulate} parts" if recipe.train.accumulate > 1 else "")
        + f"; {nearest_multiples(size, parts)}",
    )


def _check_dataset(recipe: Recipe, dataset: Dataset) -> None:
    size, images = recipe.train.batch_size, len(dataset.train)
    require(
        size <= images,
        f"train.batch_size {size} exceeds the {images} training images; give {images} or less",
    )


def _refuse_non_finite(totals: Totals, step: int) -> None:
    if not math.isfinite(totals.loss_sum):
        raise RuntimeError(
            f"the training loss is {totals.loss_sum} at step {step}; the last checkpoint is from "
            "before it; try a lower optim.lr, a warm-up or train.clip_norm"
        )


def _line(split: str, epoch: int, step: int, totals: Totals) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    return {
        "split": split,
        "epoch": epoch,
        "step": step,
        "loss": totals.loss,
        "accuracy": totals.accuracy,
        "correct": totals.correct,
        "count": totals.count,
    }


def _memory_used(accelerator: Accelerator) -> float:
    """Return the most memory in use so far: of the GPU, else of this process; megabytes."""
    import torch

    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


def _progress_bar(run: Run, epoch: int) -> Any:
    """Return a bar over the steps of an epoch, shown on a terminal only."""
    from tqdm import tqdm

    shown = run.accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(
        total=run.steps_per_epoch,
        initial=run.state.step % run.steps_per_epoch,
        desc=f"epoch {epoch + 1}/{run.recipe.train.epochs}",
        unit=" steps",
        leave=False,
        disable=not shown,
    )


def _epoch(run: Run) -> int:
    """Return the number of epochs that are complete."""
    return run.state.step // run.steps_per_epoch


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


if __name__ == "__main__":
    sys.exit(main())
