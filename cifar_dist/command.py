"""Run a command: errors become one line on stderr and an exit code."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps

from cifar_dist.errors import RunFailed, UsageError
from cifar_dist.processes.ending import end_command
from cifar_dist.processes.preemption import Preempted
from cifar_dist.processes.streams import complain, is_lost, open_streams

NOBODY_READS = 128 + 13  # a shell's exit code for SIGPIPE, which Windows does not have


def run_verb(verb: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code.

    A UsageError, or a file to which this user has no access, becomes one line and exit code 2. If
    the reader of the output has closed the pipe, as `head` does, the command exits silently.
    """
    open_streams()
    try:
        try:
            return verb(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except (UsageError, RunFailed, Preempted) as error:
        return end_command(error)
    except OSError as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            return end_command(error)
        if error.filename is not None or not is_lost(sys.stdout):
            raise
        if isinstance(error, BrokenPipeError):
            return NOBODY_READS
        complain(f"error: cannot write to stdout ({error.strerror})")
        return 1


def command(verb: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Make the `main` of a verb: `verb` run by `run_verb`, on sys.argv by default."""

    @wraps(verb)
    def main(argv: Sequence[str] | None = None) -> int:
        return run_verb(verb, argv)

    return main
