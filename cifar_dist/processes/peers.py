"""Exchange facts between ranks through a key-value store: options, failures, who is alive.

The store is torch's TCPStore. It works before the first collective and after the last one, and
under torchrun it outlives the training processes.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from cifar_dist.errors import PeerLost, PeersMissing, UsageError, one_line
from cifar_dist.processes.ending import GRACE_SECONDS, Ending
from cifar_dist.processes.environment import asked_world_size, global_rank, local_rank

MEETING_SECONDS = 60  # for all processes to arrive, after the first one
POLL_SECONDS = 0.05
LISTENING_SECONDS = 1.0
PACKAGE = Path(__file__).parents[1]

T = TypeVar("T")


class Peers:
    """The processes of one launch, including this one.

    Args:
        rank: of this process.
        world: the world size. With one process no store is used.
        timeout: seconds that a collective may take.
        patience: seconds to wait for the store.

    Attributes:
        first_here: rank of the first process of this machine.
        serves: whether this process serves the store, because the launcher does not.
        heard: why the launch ended, if the listening thread has received it.
    """

    meetings = 0  # instances in this Python process; each has its own keys in the store
    current: "Peers | None" = None  # the latest instance

    def __init__(
        self, rank: int, world: int, timeout: float, patience: float = MEETING_SECONDS
    ) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.first_here = rank - local_rank()
        self.serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.heard: Ending | None = None
        self._done = threading.Event()
        self._thread = threading.get_ident()  # the training thread: under Ray not the main one
        Peers.current = None
        if world > 1:
            Peers.meetings += 1
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._prefix = f"cifar_dist/{restart}/{Peers.meetings}"
            self._store = self._connect(patience)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()
        Peers.current = self

    @classmethod
    def late(cls) -> "Peers | None":
        """Connect after a failure that came before the processes connected; None if impossible."""
        with suppress(UsageError, RuntimeError, KeyError, ValueError):
            world = asked_world_size()
            if world > 1:
                return cls(global_rank(), world, 0, patience=GRACE_SECONDS)
        return None

    def compare(
        self, name: str, facts: Mapping[str, Any], seconds: float | None = MEETING_SECONDS
    ) -> None:
        """Raise UsageError unless all ranks have the same facts. Every process must call it.

        Args:
            name, seconds: as of `exchange`.
            facts: plain values.

        Raises:
            PeersMissing, PeerLost: as of `exchange`.
            UsageError: the message names the first rank that differs, and its differences.
        """
        first, *others = self.exchange(name, dict(facts), seconds)
        for rank, other in enumerate(others, 1):
            different = [
                f"{key} is {first.get(key)} there and {other.get(key)} on rank {rank}"
                for key in sorted({*first, *other})
                if first.get(key) != other.get(key)
            ]
            if different:
                raise UsageError(
                    f"rank {rank} was started with another {name} than rank 0: "
                    f"{'; '.join(different[:5])}; use the same on all ranks"
                )

    def exchange(self, name: str, fact: Any, seconds: float | None = MEETING_SECONDS) -> list[Any]:
        """Return the facts of all processes, by rank. Every process must call it.

        Args:
            name: name of the fact, for messages.
            fact: a plain value.
            seconds: time to wait for the other ranks. None waits without a limit, and prints which
                ranks are missing.

        Raises:
            PeersMissing: some ranks did not arrive; the message names them.
            PeerLost: the launch has ended meanwhile.
        """
        if self.world == 1:
            return [fact]
        import torch.distributed

        try:
            self._store.set(f"{name}/{self.rank}", json.dumps(fact))
            self._wait_for(name, seconds)
            facts = [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self.world)]
            self.mark(f"{name}/read")
            if self.serves:  # the store ends with this process, so wait until all have read
                self.wait_until(
                    lambda: len(self.marked(f"{name}/read")) == self.world, GRACE_SECONDS
                )
        except torch.distributed.DistNetworkError as error:
            raise PeerLost(f"rank 0 exited before it sent its {name}") from error
        return facts

    def _wait_for(self, name: str, seconds: float | None) -> None:
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        began = printed = time.monotonic()
        while not self._store.check(keys):  # store.wait would not notice that the launch ends
            time.sleep(min(1.0, POLL_SECONDS * self.world / 4))
            if self.ending():
                raise PeerLost(f"the launch ended before all processes sent their {name}")
            now = time.monotonic()
            waited = round(now - began)
            if now - (printed if seconds is None else began) < (seconds or MEETING_SECONDS):
                continue
            here = [rank for rank, key in enumerate(keys) if self.has(key)]
            missing = ", ".join(str(r) for r in range(self.world) if r not in here)
            if seconds is not None:
                raise PeersMissing(
                    f"of {self.world} processes, ranks {missing} did not arrive within {waited} s; "
                    "check their machines and logs"
                )
            printed = now
            if self.rank == min(here):
                print(f"waiting for the {name} of ranks {missing}, {waited} s", flush=True)

    def leave(self) -> None:
        """Stop the listening thread: Python must not exit while it is in the store's C++ code."""
        if self.world > 1:
            self._done.set()
            self._listener.join(GRACE_SECONDS)
        Peers.current = None

    # Keys that processes set while a launch ends; ending.py defines the protocol.

    def publish(self, ending: Ending) -> Ending:
        """Publish why the launch ends, and return the first ending that any process published."""
        fields = {name: value for name, value in asdict(ending).items() if name != "writes"}
        first = self._store.compare_set("ending", "", json.dumps(fields))
        self.put("news")
        return Ending(**json.loads(first))

    def ending(self) -> Ending | None:
        """Return the ending that was published, if one was."""
        return Ending(**json.loads(self._store.get("ending"))) if self.has("ending") else None

    def claim(self, key: str) -> bool:
        """Return whether this process is the first one to claim `key`."""
        return bool(int(self._store.compare_set(key, "", str(self.rank))) == self.rank)

    def put(self, key: str) -> None:
        """Set a key, the same for all processes."""
        self._store.set(key, "")

    def has(self, key: str) -> bool:
        """Return whether a key is set."""
        return bool(self._store.check([key]))

    def mark(self, key: str) -> None:
        """Set a key of this process."""
        self._store.set(f"{key}/{self.rank}", "")

    def marked(self, key: str) -> set[int]:
        """Return the ranks whose key is set."""
        return {rank for rank in range(self.world) if self.has(f"{key}/{rank}")}

    def wait_until(self, ready: Callable[[], T], seconds: float) -> T:
        """Call `ready` until it returns a true value or the time is up; return its last value."""
        end = time.monotonic() + seconds
        while not (found := ready()) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return found

    def call_roll(self) -> None:
        """Make every process that is alive set its "here" key, within LISTENING_SECONDS."""
        self.put("roll call")
        self.put("news")

    def ask_where(self, ranks: list[int]) -> str:
        """Ask ranks that hang where they are in the code, and return their answers as text."""
        self._store.set("where", json.dumps(ranks))
        self.put("news")
        self.wait_until(lambda: all(self.has(f"where/{rank}") for rank in ranks), GRACE_SECONDS)
        found = [
            f"rank {rank} is in {self._store.get(f'where/{rank}').decode()}"
            if self.has(f"where/{rank}")
            else f"rank {rank} does not answer"
            for rank in ranks
        ]
        return f" ({'; '.join(found)})"

    def _listen(self) -> None:
        """Answer `call_roll` and `ask_where`, and receive the ending; runs in a daemon thread."""
        answered = set()
        with suppress(UsageError, RuntimeError, KeyError):  # the launch or main thread has ended
            store = self._connect(MEETING_SECONDS)  # a second client: the first may be blocked
            while not self._done.wait(LISTENING_SECONDS):
                if not store.check(["news"]):
                    continue
                if store.check(["roll call"]) and "here" not in answered:
                    answered.add("here")
                    store.set(f"here/{self.rank}", "")
                if store.check(["where"]) and "where" not in answered:
                    answered.add("where")
                    if self.rank in json.loads(store.get("where")):
                        frame = sys._current_frames()[self._thread]
                        store.set(f"where/{self.rank}", _place(frame))
                if store.check(["ending"]):
                    self.heard = Ending(**json.loads(store.get("ending")))
                    store.set(f"heard/{self.rank}", "")
                    return

    def _connect(self, patience: float) -> Any:
        """Return a client of the launch's store; rank 0 serves it if the launcher does not.

        Raises:
            PeersMissing: the store cannot be reached within `patience` seconds.
        """
        import torch.distributed

        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            store = torch.distributed.TCPStore(
                host,
                port,
                is_master=self.serves,
                timeout=timedelta(seconds=patience),
                wait_for_workers=False,
                multi_tenant=True,  # the process group will use the same port
            )
        except torch.distributed.DistError as error:
            if self.rank == 0 and "in use" in str(error).lower():
                raise PeersMissing(
                    f"port {port} is in use by another program; choose another with the launcher's "
                    "--main_process_port or --master_port, or with MASTER_PORT"
                ) from error
            raise PeersMissing(
                f"rank {self.rank} could not reach rank 0's machine at {host}:{port} within "
                f"{patience:g} s ({one_line(error)})"
            ) from error
        return torch.distributed.PrefixStore(self._prefix, store)


def describe_process() -> dict[str, Any]:
    """Return the versions and the hash of the code, which must be equal on all ranks."""
    import hashlib
    from importlib.metadata import version

    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "accelerate")},
        "code": digest.hexdigest()[:16],
    }


def _place(frame: FrameType | None) -> str:
    """Return file and line of a frame, and of the innermost frame of this package above it."""
    assert frame is not None
    names = [f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"]
    while frame is not None and "cifar_dist" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        names.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
    return ", called from ".join(dict.fromkeys(names))
