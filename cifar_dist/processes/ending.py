"""End a launch: all processes agree on the cause, and one on each machine reports it.

A launcher sends SIGTERM to every process as soon as one of them has exited. Therefore no process
exits with an error before the cause has been reported, and a signal counts as the cause only if no
process has failed.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.errors import PeerLost, RunError, RunFailed, UsageError, UserCodeError, one_line
from cifar_dist.processes.environment import ending_file, local_rank
from cifar_dist.processes.preemption import EXIT_CODE, Preempted, ignore_signals
from cifar_dist.processes.streams import complain

if TYPE_CHECKING:
    from cifar_dist.processes.peers import Peers

FAILED, REFUSED = 1, 2  # exit codes, besides EXIT_CODE of a preempted run
GRACE_SECONDS = 3.0  # for the other processes to notice the failure
STOPPED = "stopped by a signal before training began; nothing was lost"
VANISHED = "exited without an error message (probably killed by the OOM killer)"
LOST = re.compile(
    r"gloo|NCCL|closed by peer|reset by peer|Broken pipe|Timed out waiting|Operation timed out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Ending:
    """Why a launch ends.

    Attributes:
        code: exit code of every process.
        line: the cause, with rank and place if they are known.
        traceback: of the process that failed first; empty if the line suffices.
        writes: whether this process writes status.json.
    """

    code: int
    line: str
    traceback: str = ""
    writes: bool = True

    def to_error(self) -> BaseException:
        """Return an exception of the matching type, marked as reported for `end_command`."""
        error: UsageError | Preempted | RunFailed
        if self.code == REFUSED:
            user = self.traceback
            error = UserCodeError(self.line, user) if user else UsageError(self.line)
        else:
            error = Preempted(self.line) if self.code == EXIT_CODE else RunFailed(self.line)
        error.reported = self  # type: ignore[union-attr]
        return error


def end_command(error: BaseException) -> int:
    """Report the error that ended a command, unless already reported; return the exit code."""
    ending = getattr(error, "reported", None) or agree(error, "at the start")
    return int(ending.code)


def print_ending(ending: Ending) -> None:
    """Print the traceback of the process that failed first, then the line.

    A process that `cifar-dist train --processes` started leaves both to its parent.
    """
    if _leave(ending):
        return
    begin = "" if ending.code == EXIT_CODE else f"{ending.traceback}error: "
    complain(f"{begin}{ending.line}")


def note_preempted() -> None:
    """Leave the exit code of a preempted run to the parent; launchers turn it into 1."""
    _leave(Ending(EXIT_CODE, ""))


def _leave(ending: Ending) -> bool:
    """Write an ending to the parent's file, unless there is one; return whether there is a file."""
    file = ending_file()
    if file is None:
        return False
    with suppress(OSError), file.open("x", encoding="utf-8") as report:  # the first one counts
        json.dump(asdict(ending), report)
    return True


def read_ending(file: Path) -> Ending | None:
    """Return the ending that `print_ending` left in a file, or None if it left none."""
    try:
        return Ending(**json.loads(file.read_bytes()))
    except (OSError, ValueError):  # a process may have been killed while it wrote
        return None


def agree(
    error: BaseException,
    where: str,
    report: Callable[[Ending], object] = print_ending,
    in_training: bool = False,
) -> Ending:
    """Agree with the other processes on why the launch ends, and let one per machine report it.

    The first cause that a process publishes is the cause for all. Signals are ignored meanwhile.

    Args:
        error: the exception that ended this process.
        where: the place for the message, such as "at step 12".
        report: called on one process of each machine; the others return only after it.
        in_training: whether signals are deferred on all processes. Then SIGTERM cannot keep the
            first process of a machine from reporting, and the others need not wait for it.
    """
    from cifar_dist.errors import PeersMissing
    from cifar_dist.processes.peers import Peers

    peers = Peers.current or (None if isinstance(error, PeersMissing) else Peers.late())
    own = _describe(error, where, peers, in_training)
    if peers is None or peers.world == 1:
        if local_rank() > 0:  # give local rank 0 time to report the same before this one exits
            time.sleep(GRACE_SECONDS)
        report(own)
        return own
    ignore_signals()
    try:
        return _agree(peers, error, own, where, report, in_training)
    except RuntimeError:  # the store is gone, because rank 0 or the launcher has exited
        if peers.heard:
            first = peers.heard
        elif lost_peer(error):
            first = Ending(FAILED, f"rank 0 {VANISHED} {where}")
        else:
            first = own
        first = replace(first, writes=peers.rank <= 1)
        if first.writes:
            report(first)
        return first
    finally:
        peers.leave()


def _agree(
    peers: Peers,
    error: BaseException,
    own: Ending,
    where: str,
    report: Callable[[Ending], object],
    in_training: bool,
) -> Ending:
    peers.mark("ended")
    is_cause = own.code != EXIT_CODE and not lost_peer(error)
    first = peers.publish(own if is_cause else _find_cause(peers, error, own, where))
    if local_rank() > 0 and is_cause and in_training:
        peers.mark("heard")
        return replace(first, writes=False)
    machine = f"of machine {peers.first_here}"
    if local_rank() > 0 and (is_cause or peers.first_here in peers.marked("ended")):
        peers.wait_until(lambda: peers.has(f"reporter {machine}"), GRACE_SECONDS)
    reports = peers.claim(f"reporter {machine}")
    if reports:
        report(first)
        peers.put(f"report {machine}")
    peers.wait_until(lambda: peers.has(f"report {machine}"), GRACE_SECONDS)
    ended = peers.marked("ended")
    peers.mark("heard")
    if peers.serves:  # the store ends with this process, so wait until the others know the cause
        alive = set(range(peers.world)) if is_cause else ended | peers.marked("here")
        peers.wait_until(lambda: peers.marked("heard") >= alive, GRACE_SECONDS)
    return replace(first, writes=reports and peers.rank == min(ended & {0, peers.rank}))


def _find_cause(peers: Peers, error: BaseException, own: Ending, where: str) -> Ending:
    """Wait for the failed process to publish the cause; otherwise determine which are missing."""
    peers.call_roll()
    published = peers.wait_until(
        lambda: peers.ending() or len(peers.marked("ended")) == peers.world, GRACE_SECONDS
    )
    if isinstance(published, Ending):
        return published
    missing = set(range(peers.world)) - peers.marked("ended")
    if missing and lost_peer(error) and "timed out" in str(error).lower():
        waited = f"{_name(missing)} did not arrive within {peers.timeout:g} s {where}"
        return Ending(FAILED, waited + peers.ask_where(sorted(missing)))
    # A rank that has not set its "code" key may still be importing.
    dead = missing & peers.marked("code") - peers.marked("here")
    return Ending(FAILED, f"{_name(dead)} {VANISHED} {where}") if dead else own


def lost_peer(error: BaseException) -> bool:
    """Return whether `error` only shows that another process has exited or is late."""
    if isinstance(error, PeerLost):
        return True
    if isinstance(error, NotImplementedError) or not isinstance(error, RuntimeError):
        return False
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or bool(LOST.search(str(error)))


def describe_refusal(error: PermissionError) -> str:
    """Return the message for a file or folder to which this user has no access."""
    return (
        f"'{error.filename}' cannot be used ({error.strerror}); give this user access to it, or "
        "run as its owner"
    )


def _describe(error: BaseException, where: str, peers: Peers | None, in_training: bool) -> Ending:
    """Return the ending for `error`, as if no other process had failed."""
    if isinstance(error, Preempted):
        return Ending(EXIT_CODE, STOPPED)
    if isinstance(error, UsageError):
        return Ending(REFUSED, str(error), getattr(error, "traceback", ""))
    if isinstance(error, PermissionError) and error.filename is not None and not in_training:
        return Ending(REFUSED, describe_refusal(error))
    if isinstance(error, (RunError, PeerLost)):
        return Ending(FAILED, str(error))
    if isinstance(error, KeyboardInterrupt):
        return Ending(FAILED, f"stopped at once by a second Ctrl-C {where}")
    who = f"rank {peers.rank} failed" if peers and peers.world > 1 else "failed"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    line = f"{who} {where}: {type(error).__name__}: {one_line(error, 500)}{place}"
    return Ending(FAILED, line, "".join(traceback.format_exception(error)))


def _name(ranks: set[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, sorted(ranks)))}"
