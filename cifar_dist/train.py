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
from cifar_dist.preemption import EXIT_CODE, Preempted, Preemption
from cifar_dist.runtime import leave_processes, on_main_process, run_verb, start_processes

if TYPE_CHECKING:
    from cifar_dist.data import Dataset
    from cifar_dist.session import Session


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        state: finished, or preempted: start the same recipe again to continue.
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

        result = record(run)(recipe, origin)  # names a crash in the launcher's last lines
        leave_processes()
        return EXIT_CODE if result and result.state == "preempted" else 0

    try:
        return run_verb(verb, argv)
    except Preempted:
        print("stopped by a signal before training began; nothing was lost", file=sys.stderr)
        return EXIT_CODE


def run(recipe: Recipe, origin: str = "Python") -> Result:
    """Train `recipe`, or continue the run of it that its `out` holds.

    Args:
        recipe: what to do; every process gets the same.
        origin: where the recipe came from, for the banner.

    Raises:
        UsageError: the request cannot work; nothing was started.
        Preempted: a signal came before training had begun; nothing was lost.
    """
    from cifar_dist.reporting import announce, show_inputs
    from cifar_dist.runfolder import write_status

    preemption = Preemption()
    with preemption.listen():
        session = _start(recipe)
        state = session.state
        with preemption.deferred(session.accelerator.num_processes):
            try:
                announce(session, origin)
                if not state.step:
                    show_inputs(session)
                finished = _train(session, preemption)
            except BaseException as error:
                if session.accelerator.is_main_process:
                    reason = f"{type(error).__name__}: {error}"
                    write_status(session.out, "failed", state.step, session.epochs_done, reason)
                raise
            return _finish(session, finished)


def _start(recipe: Recipe) -> Session:
    """Check the request against this machine and these data, and prepare everything."""
    from cifar_dist.data import load_dataset
    from cifar_dist.runfolder import check_out, claim
    from cifar_dist.session import find_start, open_session

    accelerator = start_processes(recipe.train, recipe.track.log_with)
    _check_batch_size(recipe, accelerator.num_processes)
    on_main_process(accelerator, lambda: check_out(recipe))
    dataset = load_dataset(recipe.data)
    _check_dataset(recipe, dataset)
    start = on_main_process(accelerator, lambda: find_start(recipe, dataset))
    out = on_main_process(accelerator, lambda: claim(recipe))
    return open_session(accelerator, recipe, dataset, out, start)


def _train(session: Session, preemption: Preemption) -> bool:
    """Train the epochs that are left, and say whether that is done; else a signal came."""
    from cifar_dist.data.batches import build_evaluation_loader, build_loader
    from cifar_dist.engine import average_buffers, evaluate, train_epoch
    from cifar_dist.reporting import progress_bar, report_epoch, report_window
    from cifar_dist.schedule import learning_rate
    from cifar_dist.session import save

    accelerator, recipe, state = session.accelerator, session.recipe, session.state
    stop = False
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
            stop = preemption.agreed()
            within = state.step % steps != 0  # an epoch's last step is saved after evaluation
            if within and (stop or _due(recipe.checkpoint.every_steps, state.step)):
                save(session)
            if within and stop:
                bar.close()
                return False
        bar.close()
        average_buffers(accelerator, state.network, state.average)
        results = {
            name: evaluate(accelerator, state.evaluated, part, session.pixels, classes)
            for name, part in evaluation.items()
        }
        report_epoch(session, epoch, results)
        if (
            stop
            or epoch + 1 == train.epochs
            or session.best["step"] == state.step
            or _due(recipe.checkpoint.every_epochs, epoch + 1)
            or _due(recipe.checkpoint.every_steps, state.step)
        ):
            save(session)
        if stop and epoch + 1 < train.epochs:
            return False
    return True


def _finish(session: Session, finished: bool) -> Result:
    """Say how it ended, once the checkpoint is there; nobody leaves before the others."""
    from cifar_dist.runfolder import write_status

    session.tracker.finish()
    result = "finished" if finished else "preempted"
    best = session.best["metrics"] if session.best["step"] is not None else None
    if session.accelerator.is_main_process:
        write_status(session.out, result, session.state.step, session.epochs_done)
        if finished and best:
            numbers = ", ".join(
                f"{name} {line['accuracy']:.4f}" for name, line in best.items() if name != "train"
            )
            print(f"best by validation: step {session.best['step']}, accuracy {numbers}")
        hint = "" if finished else "; the same command with --out continues it"
        print(f"{result} at step {session.state.step}: {session.out}{hint}", flush=True)
    session.accelerator.wait_for_everyone()
    return Result(result, session.out, session.metrics, best)


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
