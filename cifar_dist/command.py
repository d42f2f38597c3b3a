"""Run a command: parse its options, and turn errors into one line on stderr and an exit code."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

from cifar_dist import __version__
from cifar_dist.errors import RunFailed, UsageError, nearest
from cifar_dist.processes.ending import end_command
from cifar_dist.processes.preemption import Preempted
from cifar_dist.processes.streams import complain, is_lost, open_streams

NOBODY_READS = 128 + 13  # a shell's exit code for SIGPIPE, which Windows does not have


class Parser(argparse.ArgumentParser):
    """Parser for the options of one verb. An error is a UsageError, so it is one line.

    Args:
        verb: the name, such as "evaluate".
        description: the text for `--help`.
        epilog: the last line of `--help`.
    """

    def __init__(self, verb: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(
            f"cifar-dist {verb}",
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"cifar-dist {__version__}")

    def add_run_options(self) -> None:
        """Add the options that select a checkpoint and name its network."""
        self.add_argument("--checkpoint", metavar="RUN", help="RUN as an option")
        self.add_argument(
            "--best", action="store_true", help="use the best checkpoint of a run by validation"
        )
        self.add_argument(
            "--model.name",
            dest="model",
            metavar="NAME",
            help="FILE.py:NAME of the run, if its network is your own",
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, in the words of the options of a recipe."""
        message = message.removeprefix("argument ")
        found = re.fullmatch(r"(\S+): invalid (?:choice|int value): '(.*?)'(?: \((.*)\))?", message)
        if found:
            words = re.findall(r"\w+", (found[3] or "").removeprefix("choose from"))
            wanted = f"one of {', '.join(words)}" if words else "a whole number"
            message = f"{found[1]}: '{found[2]}' is not {wanted}{nearest(found[2], words)}"
        raise UsageError(f"{message}; see {self.prog} --help")

    def read(self, argv: Sequence[str]) -> Any:
        """Return the options.

        Raises:
            UsageError: an option is unknown or invalid.
        """
        options, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            known = list(self._option_string_actions)
            raise UsageError(
                f"unexpected argument '{name}'{nearest(name, known)}; see {self.prog} --help"
            )
        return options


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
