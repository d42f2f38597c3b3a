"""Standard streams that can always be written."""

import io
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


def open_streams() -> None:
    """Make printing safe. Every command calls this first.

    A closed standard stream is redirected to the null device. Otherwise the next file that is
    opened would get its file descriptor and receive the output. Characters that the console cannot
    encode are printed as escapes.
    """
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    for descriptor, mode in enumerate(modes.values()):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; os.open returns the lowest free descriptor, which is this one
            os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(descriptor, True)
    for name, mode in modes.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # notebooks and pytest replace the streams
            stream.reconfigure(errors="backslashreplace")


def progress_bar(title: str, total: int, unit: str, initial: int = 0) -> "tqdm[Any]":
    """Return a progress bar on standard error, shown on a terminal and in a notebook."""
    from tqdm import tqdm

    return tqdm(
        desc=title,
        total=total,
        unit=unit,
        initial=initial,
        leave=False,
        dynamic_ncols=True,
        bar_format="{desc} |{bar:8}| {n_fmt}/{total_fmt}{unit} {remaining}{postfix}",
        disable=not (sys.stderr.isatty() or "ipykernel" in sys.modules),
    )


def fit(text: str) -> str:
    """Wrap lines to the width of the terminal, if standard output is one."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrapped = (textwrap.wrap(line, width, subsequent_indent="    ") for line in text.splitlines())
    return "\n".join(line for lines in wrapped for line in lines)


def complain(line: str) -> None:
    """Print a line to standard error, if it can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        is_lost(sys.stderr)


def is_lost(stream: TextIO) -> bool:
    """Return whether a stream cannot be written. If so, redirect it to the null device."""
    try:
        stream.write("\n")  # an unbuffered stream has nothing to flush
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return True
    return False
