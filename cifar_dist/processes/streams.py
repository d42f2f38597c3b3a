"""The standard streams: open, and harmless if they can no longer be written."""

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    pass


def open_streams() -> None:
    """Make sure that printing works: call it first in every command.

    A standard stream that is closed leads nowhere from then on; else the next file that anything
    opens would get its descriptor, and receive what libraries print. Characters that a console
    cannot encode are shown as escapes.
    """
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for descriptor, mode in enumerate(modes.values()):
        try:
            os.fstat(descriptor)
        except OSError:  # it is closed, and the lowest that is free
            os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(descriptor, True)
    for name, mode in modes.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's and a test's may be others
            stream.reconfigure(errors="backslashreplace")


def complain(line: str) -> None:
    """Print a line on standard error, if that can still be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        is_lost(sys.stderr)


def is_lost(stream: TextIO) -> bool:
    """Return whether a stream can no longer be written; it leads nowhere from then on."""
    try:
        stream.write("\n")  # an unbuffered one has nothing left to flush
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False
