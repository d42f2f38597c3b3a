"""The exceptions that end a command with a one-line message."""

import difflib
from collections.abc import Collection, Sequence


class UsageError(Exception):
    """A request that cannot work. One line reports the problem, the expectation and the remedy."""


class RunError(Exception):
    """A run that cannot continue, for a known reason. The message is one line, as of UsageError."""


class UserCodeError(UsageError):
    """An exception raised by the user's own code.

    Attributes:
        traceback: traceback of the exception, cut to the user's files.
    """

    def __init__(self, line: str, traceback: str) -> None:
        super().__init__(line)
        self.traceback = traceback


def require(condition: bool, message: str) -> None:
    """Raise UsageError with `message` unless `condition` holds."""
    if not condition:
        raise UsageError(message)


def one_line(error: object, limit: int | None = 200) -> str:
    """Return the message of an error as one line, cut to `limit` characters unless it is None."""
    return " ".join(str(error).split())[:limit]


class PeerLost(Exception):
    """Another rank, or the store of the launch, exited while this process waited for it."""


class RunFailed(Exception):
    """A run that failed. The message is the one line that names the cause."""


class PeersMissing(UsageError):
    """Some ranks did not arrive, or this process cannot reach the others."""


def require_known(name: str, known: Collection[str], message: str) -> None:
    """Raise UsageError with `message` and the nearest known name unless `name` is known."""
    if name not in known:
        raise UsageError(f"{message}{suggest(name, sorted(known))}")


def suggest(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or else all."""
    return nearest(word, known) or f"; known: {', '.join(known)}"


def nearest(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown name: the nearest known name, or ""."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
