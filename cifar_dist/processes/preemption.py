"""Stopping early on purpose: a signal to any process becomes a decision of all at one step.

SIGTERM, SIGUSR1 (Slurm's warning) and Ctrl-C are honoured. A signal sets a flag. While the run is
being prepared there is nothing to save, and the signal also raises Preempted, except during
imports, which an exception would leave incomplete. In training all processes compare the flag after
every step and every batch of an evaluation. A second Ctrl-C stops at once.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_dist.processes.environment import is_launched

EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again
NAMES = ("SIGTERM", "SIGUSR1", "SIGINT")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
REPEAT_SECONDS = 1.0  # a launcher forwards the Ctrl-C that the terminal has already delivered


class Preempted(BaseException):
    """The run was asked to stop; like KeyboardInterrupt it is no error to be handled on the way."""


class Preemption:
    """Listens for signals while it is entered.

    Attributes:
        received: name of the first signal, or "".
    """

    _holds = 0  # blocks of `uninterrupted` that are entered
    _overdue = False  # a signal came within one

    def __init__(self) -> None:
        self.received = ""
        self._since = 0.0
        self._raises = False
        self._group: Any = None
        self._pending: Any = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle the signals within the block; elsewhere than in the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():  # Python would refuse
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        _follow_launcher()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within the block a signal, also one that came before, raises Preempted."""
        self._raises = True
        try:
            if self.received:
                raise Preempted
            yield
        finally:
            self._raises = False

    def defer(self, processes: int, timeout: float) -> None:
        """Prepare `agreed`, which will wait for the other processes `timeout` seconds at most."""
        if processes > 1:
            import torch

            # On the CPU, so that asking never waits for a GPU.
            self._group = torch.distributed.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout)
            )

    def agreed(self) -> bool:
        """Say whether any process was told to stop; all get the same answer at the same step.

        Every process must call it after every step. With several, the answer is that of the step
        before: the exchange goes on beside the next step and costs no waiting.
        """
        if self._group is None:
            return bool(self.received)
        import torch

        flag = torch.tensor([float(bool(self.received))])
        work = torch.distributed.all_reduce(
            flag, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        before, self._pending = self._pending, (work, flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.received) and time.monotonic() - self._since > REPEAT_SECONDS
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
            if self._raises:
                if Preemption._holds:
                    Preemption._overdue = True
                else:
                    raise Preempted


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block, in the main thread, signals wait until its end.

    For code that uses the locks of `threading`, which an exception from nowhere leaves broken.
    """
    Preemption._holds += 1
    try:
        yield
    finally:
        Preemption._holds -= 1
    if Preemption._overdue and not Preemption._holds:
        Preemption._overdue = False
        raise Preempted


def ignore_signals() -> None:
    """Ignore signals from here on; elsewhere than in the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():  # Python would refuse
        return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _follow_launcher() -> None:
    """Have Linux send this process SIGTERM when the launcher dies, so that it is not left alone.

    accelerate launch passes no signal on to a single process, and torchrun none that it is not told
    to. Without a launcher the parent is a shell, whose end must not end the run.
    """
    if is_launched() and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        # It may have died just before; an orphan's parent is process 1, which in a container may
        # also be the launcher itself.
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os.kill(os.getpid(), signal.SIGTERM)
