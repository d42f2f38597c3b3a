"""Train a recipe: `accelerate launch -m cifar_dist.train [--config RECIPE] [--section.key value]`.

The story of a run, from top to bottom: processes, data, network, where to continue, epochs, result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_dist.config import Recipe, nearest_multiples, parse_recipe, require
from cifar_dist.runtime import leave_processes, on_main_process, run_verb, start_processes

if TYPE_CHECKING:
    from cifar_dist.data import Dataset
    from cifar_dist.session import Session


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
    from cifar_dist.reporting import announce, show_inputs
    from cifar_dist.runfolder import check_out, claim, write_status
    from cifar_dist.session import find_start, open_session

    accelerator = start_processes(recipe.train, recipe.track.log_with)
    _check_batch_size(recipe, accelerator.num_processes)
    on_main_process(accelerator, lambda: check_out(recipe))
    dataset = load_dataset(recipe.data)
    _check_dataset(recipe, dataset)
    start = on_main_process(accelerator, lambda: find_start(recipe, dataset))
    out = on_main_process(accelerator, lambda: claim(recipe))
    session = open_session(accelerator, recipe, dataset, out, start)
    announce(session, origin)
    try:
        if not start:
            show_inputs(session)
        _train(session)
    except BaseException as error:
        if accelerator.is_main_process:
            reason = f"{type(error).__name__}: {error}"
            write_status(out, "failed", session.state.step, session.epochs_done, reason)
        raise
    return _finish(session)


def _train(session: Session) -> None:
    """Train the epochs that are left."""
    from cifar_dist.data.batches import build_evaluation_loader, build_loader
    from cifar_dist.engine import average_buffers, evaluate, train_epoch
    from cifar_dist.reporting import progress_bar, report_epoch, report_window
    from cifar_dist.schedule import learning_rate
    from cifar_dist.session import save

    accelerator, recipe, state = session.accelerator, session.recipe, session.state
    train, steps, classes = recipe.train, session.steps_per_epoch, len(session.dataset.classes)
    loader, order = build_loader(
        accelerator, session.dataset.train, train.batch_size // train.accumulate, train.seed
    )
    evaluation = {
        name: build_evaluation_loader(accelerator, images)
        for name, images in session.dataset.evaluation.items()
    }

    def schedule(step: int) -> float:
        return learning_rate(recipe.schedule, recipe.optim.lr, step, steps, train.epochs)

    for epoch in range(session.epochs_done, train.epochs):
        order.start_at(epoch, state.step % steps * train.accumulate)
        bar = progress_bar(session, epoch)
        session.clock = time.monotonic()
        for _ in train_epoch(accelerator, state, loader, session.pixels, train, schedule, epoch):
            bar.update()
            if _due(recipe.track.every_steps, state.step):
                report_window(session, epoch)
            within = state.step % steps != 0  # an epoch's last step is saved after evaluation
            if within and _due(recipe.checkpoint.every_steps, state.step):
                save(session)
        bar.close()
        average_buffers(accelerator, state.network, state.average)
        results = {
            name: evaluate(accelerator, state.evaluated, part, session.pixels, classes)
            for name, part in evaluation.items()
        }
        report_epoch(session, epoch, results)
        if (
            epoch + 1 == train.epochs
            or session.best["step"] == state.step
            or _due(recipe.checkpoint.every_epochs, epoch + 1)
            or _due(recipe.checkpoint.every_steps, state.step)
        ):
            save(session)


def _finish(session: Session) -> Result:
    from cifar_dist.runfolder import write_status

    session.tracker.finish()
    best = session.best["metrics"] if session.best["step"] is not None else None
    if session.accelerator.is_main_process:
        write_status(session.out, "finished", session.state.step, session.epochs_done)
        if best:
            numbers = ", ".join(
                f"{name} {line['accuracy']:.4f}" for name, line in best.items() if name != "train"
            )
            print(f"best by validation: step {session.best['step']}, accuracy {numbers}")
        print(f"finished: {session.out}", flush=True)
    session.accelerator.wait_for_everyone()
    return Result("finished", session.out, session.metrics, best)


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


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0


if __name__ == "__main__":
    sys.exit(main())
