"""Preemption: a signal to any rank stops all ranks at the same step.

SIGTERM, SIGUSR1 (sent by Slurm before the time limit) and Ctrl-C set a flag. Before training there
is nothing to save, so the signal also raises Preempted, except during imports, which an exception
would leave incomplete. In training all ranks reduce the flag after every step and every evaluation
batch. A second Ctrl-C stops at once.
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
REPEAT_SECONDS = 1.0  # a launcher repeats the Ctrl-C that the terminal has already delivered


class Preempted(BaseException):
    """A signal asked the run to stop. `except Exception` does not catch it."""


class Preemption:
    """Signal handlers, and the exchange of their flag between ranks.

    Attributes:
        received: name of the first signal, or "".
    """

    _holds = 0  # number of `uninterrupted` blocks being executed
    _overdue = False  # a signal arrived within one of them

    def __init__(self) -> None:
        self.received = ""
        self._since = 0.0
        self._raises = False
        self._group: Any = None
        self._pending: Any = None

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals within the block. Does nothing outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():  # signal.signal would raise
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
        """Raise Preempted within the block on a signal, including one received before."""
        self._raises = True
        try:
            if self.received:
                raise Preempted
            yield
        finally:
            self._raises = False

    def defer(self, processes: int, timeout: float) -> None:
        """Create the process group for `agreed`.

        Args:
            processes: world size.
            timeout: seconds that `agreed` waits for the other ranks.
        """
        if processes > 1:
            import torch

            # On the CPU, so that the exchange never waits for a GPU.
            self._group = torch.distributed.new_group(
                backend="gloo", timeout=timedelta(seconds=timeout)
            )

    def agreed(self) -> bool:
        """Return whether any rank has received a signal. All ranks get the same answer.

        Every rank must call this after every step. With several ranks the answer is that of the
        call before, because the all-reduce overlaps with the next step.
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
    """Delay Preempted until the end of the block.

    For code with `threading` locks, which an exception at any point could leave locked. Use it in
    the main thread only.
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
    """Ignore signals from now on. Does nothing outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():  # signal.signal would raise
        return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _follow_launcher() -> None:
    """Let Linux send SIGTERM to this process when the launcher dies.

    accelerate launch forwards no signal to a single process, and torchrun forwards only some
    signals. Without a launcher the parent is a shell, whose exit must not end the run.
    """
    if is_launched() and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        # The launcher may have died before prctl. The parent is then process 1. In a container,
        # process 1 may also be the launcher itself.
        if os.getppid() == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os.kill(os.getpid(), signal.SIGTERM)
