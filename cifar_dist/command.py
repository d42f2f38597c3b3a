"""Run a command: errors become one line on standard error and an exit code."""

import sys
from collections.abc import Callable, Sequence

from cifar_dist.errors import RunFailed, UsageError
from cifar_dist.processes.ending import end_command
from cifar_dist.processes.preemption import Preempted
from cifar_dist.processes.streams import complain, is_lost, open_streams

NOBODY_READS = 128 + 13  # SIGPIPE, as a shell reports it; Windows has no such signal


def run_verb(verb: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command and return its exit code; a UsageError becomes one line and code 2.

    So does a file that this user may not read or write. Where the reader of its output has seen
    enough, as `head` has, it ends without a word.
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
        complain(f"error: the standard output cannot be written ({error.strerror})")
        return 1
