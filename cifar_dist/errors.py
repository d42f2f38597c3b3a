"""The exceptions that end a command with one line, and the check that raises one."""

import difflib
from collections.abc import Sequence


class UsageError(Exception):
    """A request that cannot work; one line says what was found, what was expected, what to do."""


class RunError(Exception):
    """A run that cannot go on for a known reason; one line, as of UsageError, says all."""


class UserCodeError(UsageError):
    """An exception raised by the user's own code.

    Attributes:
        traceback: its traceback, cut to the user's files.
    """

    def __init__(self, line: str, traceback: str) -> None:
        super().__init__(line)
        self.traceback = traceback


def require(condition: bool, message: str) -> None:
    """Raise UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def one_line(error: object, limit: int = 200) -> str:
    """Return the message of an error as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


class PeerLost(Exception):
    """Another process, or the store of the launch, has ended while this one waited for it."""


class RunFailed(Exception):
    """A run that failed; the message is the line that names the cause."""


class PeersMissing(UsageError):
    """Some processes did not arrive, or this process cannot reach the others."""


def suggest(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known one, else all."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"
