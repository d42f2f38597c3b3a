"""Start real training processes in a fraction of a second, forked from one that imported torch.

They get the environment variables of torchrun, but there is no launcher that would end them.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType

from tests.faults.inject import inject
from tests.helpers import free_port

PRELOADED = ["cifar_dist.train", "cifar_dist.training.run", "tests.forked"]
PRELOADED += ["torch._dynamo", "torch.distributed.elastic.multiprocessing.errors"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


@dataclass
class Job:
    """The processes of one run, in order of rank, and the files with their output."""

    processes: list[ForkServerProcess]
    outputs: list[Path]
    group: int = 0

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL all remaining processes at once, and wait for their end."""
        if any(process.is_alive() for process in self.processes):
            with suppress(ProcessLookupError):
                os.killpg(self.group, signal.SIGKILL)
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all ranks as a launcher does."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Return all exit codes: -9 after SIGKILL, None if a process still runs."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until `ready` returns True; fail if the job ends or the time is up before."""
        end = time.monotonic() + seconds
        while not ready():
            assert any(process.is_alive() for process in self.processes), self.text()
            assert time.monotonic() < end, f"timed out: {self.text()}"
            time.sleep(0.003)

    def text(self, rank: int | None = None) -> str:
        """Return the output of one rank, or the outputs of all ranks in order."""
        chosen = self.outputs if rank is None else [self.outputs[rank]]
        return "".join(path.read_text() for path in chosen if path.is_file())


def start(
    arguments: Sequence[str],
    processes: int = 1,
    *,
    folder: Path,
    fault: str = "",
    **environment: str,
) -> Job:
    """Start `cifar_dist.train` on some processes.

    Args:
        arguments: of the command; a list of lists has one list per rank.
        folder: for the output of the processes.
        fault: "function argument..." of tests/faults/inject.py, called before training starts.
        environment: variables to add.
    """
    folder.mkdir(exist_ok=True)
    port = str(free_port())
    job = Job([], [])
    for rank in range(processes):
        own = arguments[rank] if isinstance(arguments[0], list) else arguments
        variables = {}
        if processes > 1:
            variables |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
            variables |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables |= environment
        output = folder / f"rank-{rank}-{time.monotonic_ns()}.txt"
        process = _context.Process(
            target=_enter,
            args=(list(own), str(output), job.group, fault, variables),
        )
        process.start()
        job.group = job.group or process.pid or 0
        job.processes.append(process)
        job.outputs.append(output)
    return job


def _enter(
    arguments: list[str], output: str, group: int, fault: str, variables: dict[str, str]
) -> None:
    """Redirect the output, set the environment, and run the training command."""
    while True:  # retry until rank 0 has created the process group
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(0, group)
            break
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(variables)
    if fault:
        inject(fault)
    from cifar_dist.train import main

    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)
