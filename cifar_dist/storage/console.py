"""Log files: the output of every rank goes to its own file, that of rank 0 to the console too."""

import io
import os
import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TextIO

from cifar_dist.processes.streams import is_lost
from cifar_dist.storage.folder import Warned


class _Copy(io.TextIOBase):
    """A stream that writes to a log file and, if `shown`, to the stream that it replaces.

    Writing never raises, because a failing console must not end the run.
    """

    def __init__(self, stream: TextIO, shown: bool, file: TextIO | None, warned: Warned) -> None:
        self.stream, self.shown, self.file, self.warned = stream, shown, file, warned

    def write(self, text: str) -> int:
        """Write; progress bars, which use carriage returns, are left out of the file."""
        if self.shown:
            with self._lost():
                self.stream.write(text)
        if self.file is not None and "\r" not in text:
            with self.warned.spare("the log"):
                self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the console; the file is line-buffered."""
        with self._lost():
            self.stream.flush()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """Within the block, redirect the console to /dev/null once it cannot be written.

        The terminal or the SSH connection was closed, or the disk that holds the output is full.
        """
        with self.warned.spare("the console"):
            try:
                yield
            except OSError as error:
                lost = is_lost(self.stream)
                if not (lost and isinstance(error, BrokenPipeError)):
                    raise

    def isatty(self) -> bool:
        """Return whether the output is shown on a terminal."""
        return self.shown and self.stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the stream that this one replaces."""
        return self.stream.fileno()


@contextmanager
def kept(out: Path, rank: int, warned: Warned) -> Iterator[None]:
    """Within the block, copy all output of this process to `out`/logs/rank-N.log.

    An exception that leaves the block is logged with its traceback. Machines that do not share the
    run folder write to a folder of the same path.

    Args:
        rank: the output of rank 0 is also shown on the console. That of other ranks is shown only
            if they have no log file.
        warned: a log file that cannot be written causes a warning and does not end the run.
    """
    file: TextIO | None = None
    with warned.spare("the log"):
        (out / "logs").mkdir(parents=True, exist_ok=True)
        path = out / "logs" / f"rank-{rank}.log"
        file = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        file.write(f"# {now}, rank {rank}, process {os.getpid()} on {platform.node()}\n")
    before = sys.stdout, sys.stderr
    shown = rank == 0 or file is None
    sys.stdout, sys.stderr = (_Copy(stream, shown, file, warned) for stream in before)
    try:
        yield
    except BaseException:
        with warned.spare("the log"):
            if file is not None:
                file.write(traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = before
        with warned.spare("the log"):
            if file is not None:
                file.close()
