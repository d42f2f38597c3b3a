"""A training run from top to bottom: processes, data, network, checkpoint, epochs, result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cifar_dist.config import OWN_KEYS, Recipe, comparable, local_path, nearest_multiples
from cifar_dist.data import Dataset, load_dataset
from cifar_dist.data.batches import build_evaluation_loader, build_loader
from cifar_dist.errors import RunError, UsageError, require
from cifar_dist.processes.ending import FAILED, Ending, agree
from cifar_dist.processes.environment import asked_world_size, global_rank
from cifar_dist.processes.preemption import EXIT_CODE, Preempted, Preemption
from cifar_dist.processes.start import on_main_process, start_processes
from cifar_dist.processes.streams import open_streams
from cifar_dist.storage.checkpoint import newest_progress
from cifar_dist.storage.console import kept
from cifar_dist.storage.folder import RunLock, check_out, claim, read_metrics, write_status
from cifar_dist.training.console import Console, show_end
from cifar_dist.training.engine import average_buffers, evaluate, refuse_bad_numbers, train_epoch
from cifar_dist.training.metrics import Evaluation
from cifar_dist.training.reporting import (
    announce,
    report_epoch,
    report_window,
    show_inputs,
)
from cifar_dist.training.schedule import learning_rate, total_steps
from cifar_dist.training.session import (
    Session,
    compare_weights,
    find_start,
    finish_epoch,
    finish_window,
    open_session,
    save,
)
from cifar_dist.user_code import UserCode, copy_files, from_object, load_all


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        state: finished, or preempted (start the same recipe again to resume).
        out: run folder.
        metrics: of the last epoch: one entry per split, with loss, accuracy, correct and count.
        best: metrics of the epoch with the best validation accuracy; None without validation.
        network: the trained network, with averaged weights if the recipe averages them.
    """

    state: str
    out: Path
    metrics: dict[str, dict[str, Any]]
    best: dict[str, Any] | None
    network: nn.Module

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.out)


class Stopped(Exception):
    """All processes have agreed to stop, after one of them received a signal."""


def run(recipe: Recipe, origin: str = "Python", model: Any = None) -> Result:
    """Train `recipe`, or resume the run of it in `out`.

    Args:
        recipe: the same in every process.
        origin: name or file of the recipe, for the banner.
        model: class or function of the network, in place of recipe.model.name.

    Raises:
        UsageError: the request cannot work; nothing was started.
        Preempted: a signal arrived before training began; nothing was lost.
        RunFailed: the run failed; status.json holds the same message.
    """
    open_streams()
    preemption = Preemption()
    with preemption.listen():
        return run_until_end(recipe, origin, preemption, lambda ending: None, model)


def run_until_end(
    recipe: Recipe,
    origin: str,
    preemption: Preemption,
    report: Callable[[Ending], object],
    model: Any = None,
) -> Result:
    """Train `recipe` under the caller's signal handlers; `report` prints the cause of a failure."""
    session: Session | None = None
    code = from_object(model) if model is not None else None
    if code:
        recipe = replace(recipe, model=replace(recipe.model, name=code.place))
    with RunLock() as lock:
        try:
            session = _start(recipe, lock, preemption, code)
            with kept(session.out, session.accelerator.process_index, session.warned):
                with session.warned.spare("the banner"):
                    announce(session, origin)
                if not session.state.step:
                    with session.warned.spare("showing the inputs"):
                        show_inputs(session)
                with suppress(Stopped):
                    _train(session, preemption)
                    return _finish(session, "finished")
                save(session)
                return _finish(session, "preempted")
        except (Exception, KeyboardInterrupt, Preempted) as error:
            ending = _end(recipe, lock, session, error, report)
            raise ending.to_error() from (error if ending.code == FAILED else None)


def _start(recipe: Recipe, lock: RunLock, preemption: Preemption, code: UserCode | None) -> Session:
    """Check the recipe against this machine and the dataset, and build the session."""
    _check_batch_size(recipe, asked_world_size())
    with preemption.interruptible():
        asked = {key: value for key, value in comparable(recipe).items() if key not in OWN_KEYS}
        accelerator, peers = start_processes(recipe.train, recipe.track.log_with, asked)
        on_main_process(accelerator, lambda: check_out(recipe, lock))
        codes = load_all({"train.loss": recipe.train.loss})
        codes |= {"model.name": code} if code else load_all({"model.name": recipe.model.name})
        hashes = [code.hashes() for code in codes.values()]
        peers.compare("source code", {name: h for files in hashes for name, h in files.items()})
        dataset = load_dataset(recipe.data)
        dataset.require_batch(recipe.train.batch_size, recipe.optim)
        # Listing and decoding the images may take one machine longer than the others.
        peers.compare("dataset", describe(dataset), seconds=None)
        start = on_main_process(accelerator, lambda: find_start(recipe, dataset, codes))
        out = on_main_process(accelerator, lambda: claim(recipe, lock))
        if codes and accelerator.is_main_process:
            copy_files(codes, out / "code")
        session = open_session(accelerator, peers, recipe, dataset, out, start, codes)
        preemption.defer(accelerator.num_processes, recipe.train.timeout)
    return session


def _train(session: Session, preemption: Preemption) -> None:
    """Train the remaining epochs.

    Raises:
        Stopped: a process received a signal; the current step is not saved yet.
    """
    accelerator, recipe, state = session.accelerator, session.recipe, session.state
    train, steps, pixels = recipe.train, session.steps_per_epoch, session.pixels
    loader, order = build_loader(
        accelerator,
        session.dataset.train,
        train.batch_size // train.accumulate,
        train.seed,
        train.accumulate,
    )

    def schedule(step: int) -> float:
        return learning_rate(recipe.schedule, recipe.optim.lr, step, steps, train.epochs)

    def check_numbers() -> None:
        refuse_bad_numbers(accelerator, state, loader, order, pixels, train, session.loss)

    total = total_steps(train.epochs, steps)
    every = recipe.track.interval(total)
    console = Console(session)
    for epoch in range(math.ceil(session.progress.epoch), math.ceil(total / steps)):
        begin, end = epoch * steps, session.end_of(epoch)
        order.start_at(
            epoch, (state.step - begin) * train.accumulate, (end - begin) * train.accumulate
        )
        session.clock = time.monotonic()
        with console.epoch(epoch):
            for _ in train_epoch(
                accelerator, state, loader, pixels, train, session.loss, schedule, epoch
            ):
                console.update()
                reports = _due(every, state.step)
                stop = preemption.agreed()
                saves = stop or _due(recipe.checkpoint.every_steps, state.step)
                if reports or saves:
                    check_numbers()
                if reports:
                    window = finish_window(session)
                    with session.warned.spare("the report of a window"):
                        report_window(session, epoch, window)
                if state.step == end:  # saved after the evaluation
                    continue
                if stop:
                    raise Stopped
                if saves:
                    save(session)
        check_numbers()
        compare_weights(session)
        last = end == total
        results = {}
        if last or _due(train.evaluate_every, epoch + 1):
            results = _measure(session, preemption)
        finish_epoch(session, epoch, results)
        with session.warned.spare("the report of an epoch"):
            report_epoch(session, results)
            console.show_epoch(epoch)
        if preemption.agreed() and not last:
            raise Stopped
        if (
            last
            or session.progress.best.step == state.step
            or _due(recipe.checkpoint.every_epochs, epoch + 1)
            or _due(recipe.checkpoint.every_steps, state.step)
        ):
            save(session)


def _measure(session: Session, preemption: Preemption) -> dict[str, Evaluation]:
    """Evaluate the network on each evaluation split.

    Raises:
        Stopped: a process received a signal.
    """
    accelerator, state = session.accelerator, session.state

    def stop_if_agreed() -> None:
        if preemption.agreed():
            raise Stopped

    average_buffers(accelerator, *state.networks)
    return {
        name: evaluate(
            accelerator,
            state.evaluated,
            build_evaluation_loader(accelerator, images),
            session.pixels,
            len(session.dataset.classes),
            tta=session.recipe.train.tta,
            between=stop_if_agreed,
        )
        for name, images in session.dataset.evaluation.items()
    }


def _finish(session: Session, state: str) -> Result:
    """Write the final status after the checkpoint is saved, and wait for all processes."""
    session.saver.wait(final=True)
    progress, step = session.progress, session.state.step
    measured = {k: v for k, v in progress.metrics.items() if k != "train"}
    session.tracker.result(
        session.recipe, {f"accuracy/{name}": line["accuracy"] for name, line in measured.items()}
    )
    session.tracker.finish()
    best = progress.best.metrics or None
    if session.accelerator.is_main_process:
        with session.warned.spare("status.json"):
            write_status(session.out, state, step, progress.epoch)
        show_end(session, state)
    session.peers.leave()
    session.accelerator.wait_for_everyone()
    return Result(state, session.out, progress.metrics, best, session.state.evaluated.eval())


def _end(
    recipe: Recipe,
    lock: RunLock,
    session: Session | None,
    error: BaseException,
    report: Callable[[Ending], object],
) -> Ending:
    """Agree with the other processes on why the run ends, and write the cause to status.json."""
    if session is None:
        ending = agree(error, "at the start", report)
        # Rank 0 may hold the lock on the folder, so it writes too.
        writes = ending.writes or global_rank() == 0
        if ending.code == EXIT_CODE and writes and recipe.out:
            _note_preempted(local_path(recipe.out), lock)
        return ending
    state = session.state
    ending = agree(error, f"at step {state.step}", report, in_training=True)
    if not isinstance(error, KeyboardInterrupt):
        with suppress(RunError):  # the first failure is reported
            session.saver.wait()
    if ending.writes and ending.code == EXIT_CODE:
        _note_preempted(session.out, lock)
    elif ending.writes:
        with session.warned.spare("status.json"):
            write_status(session.out, "failed", state.step, session.progress.epoch, ending.line)
    return ending


def _note_preempted(out: Path, lock: RunLock) -> None:
    """Write to a run folder that its run was stopped before it began or resumed."""
    with suppress(UsageError, OSError):  # the next start reports them
        out.mkdir(parents=True, exist_ok=True)
        lock.take(out)
        saved = newest_progress(out / "checkpoints")
        write_status(out, "preempted", saved.step if saved else 0, saved.epoch if saved else 0)


def _check_batch_size(recipe: Recipe, world: int) -> None:
    size, parts = recipe.train.batch_size, world * recipe.train.accumulate
    require(
        size % parts == 0,
        f"train.batch_size {size} does not divide among {world} processes"
        + (f" x {recipe.train.accumulate} parts" if recipe.train.accumulate > 1 else "")
        + f"; {nearest_multiples(size, parts)}",
    )


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return the properties of the dataset that all processes must share, as plain values."""
    return {
        "digest": dataset.digest,
        "classes": list(dataset.classes),
        "training images": len(dataset.train),
        **{f"{name} images": len(part) for name, part in dataset.evaluation.items()},
    }


def _due(every: int, number: int) -> bool:
    return every > 0 and number % every == 0
