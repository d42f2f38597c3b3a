"""What a process says: every rank writes it to a file of its own, and rank 0 shows it as well."""

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
    """A stream that writes to a file, and to the stream it stands for if that is to be shown.

    Writing never raises: what a process prints only observes the run.
    """

    def __init__(self, stream: TextIO, shown: bool, file: TextIO | None, warned: Warned) -> None:
        self.stream, self.shown, self.file, self.warned = stream, shown, file, warned

    def write(self, text: str) -> int:
        """Write; progress bars, which begin lines anew, are left out of the file."""
        if self.shown:
            with self._lost():
                self.stream.write(text)
        if self.file is not None and "\r" not in text:
            with self.warned.spare("the log"):
                self.file.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what is shown; the file is, after each line."""
        with self._lost():
            self.stream.flush()

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """Within the block, if the console cannot be written any more, let it lead nowhere.

        The terminal is gone, or the connection of ssh, or the disk that holds the output is full.
        """
        with self.warned.spare("the console"):
            try:
                yield
            except OSError as error:
                lost = is_lost(self.stream)
                if not (lost and isinstance(error, BrokenPipeError)):
                    raise

    def isatty(self) -> bool:
        """Return whether a person is looking."""
        return self.shown and self.stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream that this one stands for."""
        return self.stream.fileno()


@contextmanager
def kept(out: Path, rank: int, warned: Warned) -> Iterator[None]:
    """Within the block all that this process prints goes to `out`/logs/rank-N.log.

    An exception that leaves the block is written there with its traceback. On machines that do not
    share the run folder the files are in one of the same name.

    Args:
        rank: rank 0's words are shown on the console too, the others' only where they have no log.
        warned: a log that cannot be written is warned of, and does not end the run.
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
