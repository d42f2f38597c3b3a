"""The console of a run, on rank 0: a table of epochs, a progress bar, and the last lines."""

import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cifar_dist.processes.streams import progress_bar
from cifar_dist.training.schedule import total_steps
from cifar_dist.training.session import Session
from cifar_dist.user_code import is_user_code

REFRESH_SECONDS = 0.5  # between two readings of the loss for the bar, which wait for the device


class Console:
    """Prints the table of epochs and shows the progress bar. On other ranks it prints nothing."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._shown = session.accelerator.is_main_process
        self._began = self._epoch_began = self._refreshed = time.monotonic()
        self._first_step = session.state.step
        self._splits = ["train", *session.dataset.evaluation]
        self._bar: Any = None
        if self._shown:
            loss = loss_name(session)
            heads = "".join(f"{name:>18}" for name in self._splits)
            losses = "".join(
                f" {loss if name == 'train' else 'loss':>8} accuracy" for name in self._splits
            )
            print(f"{'':8}{heads}\n{'epoch':8}{losses}{'time':>8}{'left':>9}", flush=True)

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[None]:
        """Show the progress bar of an epoch within the block."""
        session = self._session
        self._epoch_began = time.monotonic()
        with session.warned.spare("the progress bar"):
            if self._shown:
                self._bar = progress_bar(
                    f"epoch {epoch + 1}/{session.recipe.train.epochs}",
                    session.end_of(epoch) - epoch * session.steps_per_epoch,
                    "",
                    session.state.step % session.steps_per_epoch,
                )

        try:
            yield
        finally:
            if self._bar is not None:
                with session.warned.spare("the progress bar"):
                    self._bar.close()

    def update(self) -> None:
        """Advance the bar by one step, and at times show the loss, accuracy and speed."""
        if self._bar is None or self._bar.disable:
            return
        with self._session.warned.spare("the progress bar"):
            now = time.monotonic()
            if now - self._refreshed > REFRESH_SECONDS:
                self._refreshed = now
                loss, correct, count = self._session.state.tally.sums.tolist()  # of this rank
                images = self._bar.n - self._bar.initial + 1
                rate = images * self._session.recipe.train.batch_size / (now - self._epoch_began)
                self._bar.set_postfix_str(
                    f"loss {loss / count:.4f}, accuracy {correct / count:.4f}, {rate:.0f} images/s",
                    refresh=False,
                )
            self._bar.update()

    def show_epoch(self, epoch: int) -> None:
        """Print the metrics of an epoch as one line of the table."""
        if not self._shown:
            return
        session, now = self._session, time.monotonic()
        metrics, epochs = session.progress.metrics, session.recipe.train.epochs
        step, total = session.state.step, total_steps(epochs, session.steps_per_epoch)
        left = (now - self._began) / max(1, step - self._first_step) * (total - step)
        cells = "".join(_cells(metrics.get(name)) for name in self._splits)
        times = f"{duration(now - self._epoch_began):>8}{duration(left):>9}"
        print(f"{f'{epoch + 1}/{epochs}':8}{cells}{times}", flush=True)


def loss_name(session: Session) -> str:
    """Return the name of the training loss, which may not be comparable with the evaluation's."""
    train = session.recipe.train
    return "own loss" if train.loss else "smoothed" if train.label_smoothing else "loss"


def _cells(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return f" {'-':>8} {'-':>8}"
    loss = line["loss"]
    return f" {loss:8{'.4f' if loss < 100 else '.3g'}} {line['accuracy']:8.4f}"


def duration(seconds: float) -> str:
    """Return a time such as "4.2 s", "1:05" or "2:00:30"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def show_end(session: Session, state: str) -> None:
    """Print the result, the run folder, and the commands that a person needs next."""
    progress, step, out = session.progress, session.state.step, session.out
    if state != "finished":
        print(f"{state} at step {step}: {out}; the same command with --out {out} resumes it")
        return
    best = progress.best
    for name, line in progress.metrics.items():
        if name != "train":
            text = f"{name} accuracy {line['accuracy']:.4f} ({line['correct']} of {line['count']})"
            if best.metrics and name in best.metrics:
                at = best.step / session.steps_per_epoch if best.step else 0
                text += (
                    f"; {best.metrics[name]['accuracy']:.4f} at epoch {at:g}, best by validation"
                )
            print(text)
    model = session.recipe.model.name
    named = f" --model.name {shlex.quote(model)}" if is_user_code(model) else ""
    place = shlex.quote(str(out))
    print(
        f"finished at step {step}: {out}\n"
        f"  cifar-dist evaluate {place}{named}\n"
        f"  cifar-dist predict {place} IMAGE{named}\n"
        f"  tensorboard --logdir {shlex.quote(str(out.parent))}",
        flush=True,
    )
