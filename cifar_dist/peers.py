"""What processes tell each other besides tensors: who is there, what each was told, what failed.

It goes through the key-value store of the launch, which works before the first collective and after
the last one, and under torchrun outlives every process that trains.
"""

import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from cifar_dist.config import RunError, UsageError
from cifar_dist.preemption import Preempted

MEETING_SECONDS = 60  # for all processes to arrive, once the first of them is there
GRACE_SECONDS = 3.0  # for the others to notice what this process has noticed
STOPPED = "stopped by a signal before training began"
VANISHED = "ended without a word (killed from outside, most often for want of memory)"
LOST = re.compile(r"gloo|NCCL|closed by peer|reset by peer|Broken pipe|Timed out waiting", re.I)


class PeersMissing(UsageError):
    """Some processes did not arrive; the first of those that did reports it."""

    def __init__(self, message: str, reporter: bool) -> None:
        super().__init__(message)
        self.reporter = reporter


class Peers:
    """The processes of one launch, this one among them.

    Args:
        rank, world: of this process, and how many there are. One alone needs no store.
        timeout: seconds that a collective may take.
    """

    meetings = 0  # of this Python process; each has its own keys

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._done = threading.Event()
        if world == 1:
            return
        Peers.meetings += 1
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = f"cifar_dist/{restart}/{Peers.meetings}"
        self._store = self._connect()
        threading.Thread(target=self._say_where, daemon=True).start()

    def compare(
        self, what: str, facts: Mapping[str, Any], seconds: float | None = MEETING_SECONDS
    ) -> None:
        """Refuse to go on unless every process has the same facts; every process must call it.

        Args:
            what: what the facts are of, for the message.
            facts: plain values.
            seconds: to wait for the others; None waits as long as they live, and says so.

        Raises:
            PeersMissing: naming the ranks that did not come.
            UsageError: naming the first rank that differs, and what differs.
        """
        first, *others = self.tell(what, dict(facts), seconds)
        for rank, other in enumerate(others, 1):
            different = [
                f"{key} is {first.get(key)} there and {other.get(key)} on rank {rank}"
                for key in sorted({*first, *other})
                if first.get(key) != other.get(key)
            ]
            if different:
                raise UsageError(
                    f"rank {rank} was started with another {what} than rank 0: "
                    f"{'; '.join(different[:5])}; start all with the same"
                )

    def tell(self, what: str, fact: Any, seconds: float | None = MEETING_SECONDS) -> list[Any]:
        """Tell the others something, and return what each process told, by rank.

        Args:
            what: what the fact is, for the message.
            fact: a plain value.
            seconds: to wait for the others; None waits as long as they live, and says so.

        Raises:
            PeersMissing: naming the ranks that did not come.
        """
        if self.world == 1:
            return [fact]
        self._store.set(f"{what}/{self.rank}", json.dumps(fact))
        self._wait_for(what, seconds)
        told = [json.loads(self._store.get(f"{what}/{rank}")) for rank in range(self.world)]
        self._store.set(f"{what}/read/{self.rank}", "")
        if self.rank == 0:  # it may hold the store, and leave with it
            with suppress(RuntimeError):
                keys = [f"{what}/read/{rank}" for rank in range(self.world)]
                self._store.wait(keys, timedelta(seconds=GRACE_SECONDS))
        return told

    def explain(self, error: BaseException, where: str) -> tuple[str, bool]:
        """Return the line about the end of a run, and whether this process is to say it.

        Where one fails all end, and one of them speaks, rank 0 if it can.

        Args:
            error: what ended this process.
            where: "at step 12" or the like.
        """
        if self.world == 1 or not lost_peer(error):
            line = self._describe(error, where)
            if isinstance(error, Preempted):  # perhaps only because another has failed
                line = self.cause() or line
            if self.world > 1:
                with suppress(RuntimeError):  # the store may be gone already
                    self._store.compare_set("cause", "", line)
            return line, self.rank == 0
        try:
            line, arrived = self._ask_others(error, where)
        except RuntimeError:  # the store went with rank 0
            line, arrived = f"rank 0 {VANISHED} {where}", set(range(1, self.world))
        return line, self.rank == min(arrived)

    def cause(self) -> str | None:
        """Return what another process said it failed of, if one did."""
        if self.world == 1:
            return None
        try:
            known = self._store.check(["cause"])
            return str(self._store.get("cause").decode()) if known else None
        except RuntimeError:  # the store went with the launcher, or with rank 0
            return None

    def leave(self) -> None:
        """Stop listening, while every process is still there."""
        self._done.set()

    def _describe(self, error: BaseException, where: str) -> str:
        if isinstance(error, RunError):
            return str(error)
        if isinstance(error, Preempted):
            return STOPPED
        if isinstance(error, KeyboardInterrupt):
            return f"stopped at once by a second Ctrl-C {where}"
        who = f"rank {self.rank} failed" if self.world > 1 else "failed"
        reason = " ".join(str(error).split())[:500]
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        return f"{who} {where}: {type(error).__name__}: {reason}{place}"

    def _connect(self) -> Any:
        """Return a client of the launch's store; rank 0 serves it where the launcher does not.

        Raises:
            PeersMissing: it cannot be reached.
        """
        import torch.distributed

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = torch.distributed.TCPStore(
                host,
                port,
                is_master=self.rank == 0 and not by_launcher,
                timeout=timedelta(seconds=MEETING_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,  # the process group is going to use the same port
            )
        except torch.distributed.DistError as error:
            if self.rank == 0 and "in use" in str(error).lower():
                raise PeersMissing(
                    f"port {port} is taken by another program; choose another with the launcher's "
                    "--main_process_port or --master_port, or with MASTER_PORT",
                    reporter=True,
                ) from error
            raise PeersMissing(
                f"rank {self.rank} could not reach rank 0's machine at {host}:{port} within "
                f"{MEETING_SECONDS} s ({' '.join(str(error).split())[:200]})",
                reporter=True,
            ) from error
        return torch.distributed.PrefixStore(self._prefix, store)

    def _wait_for(self, what: str, seconds: float | None) -> None:
        import torch.distributed

        keys = [f"{what}/{rank}" for rank in range(self.world)]
        began = time.monotonic()
        while True:
            try:
                self._store.wait(keys, timedelta(seconds=seconds or MEETING_SECONDS))
                return
            except torch.distributed.DistNetworkError as error:
                raise PeersMissing(f"rank 0 left before it told its {what}", False) from error
            except torch.distributed.DistStoreError as error:
                here = [rank for rank, key in enumerate(keys) if self._store.check([key])]
                missing = ", ".join(str(r) for r in range(self.world) if r not in here)
                waited = round(time.monotonic() - began)
                if seconds is not None:
                    raise PeersMissing(
                        f"of {self.world} processes, ranks {missing} did not arrive within "
                        f"{waited} s; look at their machines and logs",
                        reporter=self.rank == min(here),
                    ) from error
                if self.rank == min(here):
                    print(f"waiting for the {what} of ranks {missing}, {waited} s", flush=True)

    def _ask_others(self, error: BaseException, where: str) -> tuple[str, set[int]]:
        """Find out why a peer was lost, and which processes, this one among them, lost it too."""
        self._store.set(f"lost/{self.rank}", "")
        arrived, end = {self.rank}, time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and len(arrived) < self.world:
            time.sleep(0.1)
            arrived |= {r for r in range(self.world) if self._store.check([f"lost/{r}"])}
            if 0 in arrived and self._store.check(["cause"]):
                break
        cause = self.cause()
        if cause is not None:
            return cause, arrived
        missing = [rank for rank in range(self.world) if rank not in arrived]
        if not missing:
            return self._describe(error, where), arrived
        who = f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing))}"
        if "timed out" in str(error).lower():
            waited = f"{who} did not arrive within {self.timeout:g} s {where}"
            return waited + self._ask_where(missing), arrived
        return f"{who} {VANISHED} {where}", arrived

    def _ask_where(self, ranks: list[int]) -> str:
        """Ask ranks that hang what their main thread is doing."""
        self._store.set("where", json.dumps(ranks))
        time.sleep(GRACE_SECONDS)
        keys = {rank: f"where/{rank}" for rank in ranks}
        found = [
            f"rank {rank} is in {self._store.get(key).decode()}"
            if self._store.check([key])
            else f"rank {rank} does not answer"
            for rank, key in keys.items()
        ]
        return f" ({'; '.join(found)})"

    def _say_where(self) -> None:
        """Answer `_ask_where`, in a thread, as long as the store is there."""
        try:
            store = self._connect()  # a connection of its own: the main thread's may be blocked
            while not store.check(["where"]):
                if self._done.wait(1.0):
                    return
            if self.rank in json.loads(store.get("where")):
                frame = sys._current_frames()[threading.main_thread().ident or 0]
                store.set(f"where/{self.rank}", _place(frame))
        except (UsageError, RuntimeError):  # the launch is over
            return


def lost_peer(error: BaseException) -> bool:
    """Say whether `error` only tells that another process is gone or late."""
    import torch.distributed

    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, NotImplementedError)
        and bool(LOST.search(str(error)))
    )


def describe_process() -> dict[str, Any]:
    """Return what must be the same in all processes whatever they do: the code and its versions."""
    import hashlib
    from importlib.metadata import version

    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "accelerate")},
        "code": digest.hexdigest()[:16],
    }


def _place(frame: FrameType | None) -> str:
    """Name a frame, and the innermost one of ours below it."""
    assert frame is not None
    names = [f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"]
    while frame is not None and "cifar_dist" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
    return ", called from ".join(dict.fromkeys(names))
