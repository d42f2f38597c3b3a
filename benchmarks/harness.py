"""Measure programs side by side: each is a process, runs in rounds, and is compared per round.

A subject is a program that trains and, after every `steps` steps, waits for the start of the next
round. All subjects have started and warmed up before the first round, and only one runs at a time.
The speed of a machine drifts, so results are medians over rounds of ratios within a round.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "accelerate", "lightning", "timm", "airbench")


class Meter:
    """Count steps in a subject, which calls `tick` after every step.

    Args:
        steps: per round.
        warmup: steps before the first round.
    """

    def __init__(self, steps: int, warmup: int) -> None:
        self.steps, self.left, self.warm = steps, warmup, False
        self._out = os.fdopen(os.dup(1), "w")  # stdout is for reports; the subject prints to stderr
        os.dup2(2, 1)

    def tick(self, **found: float) -> None:
        """Count a step. At the end of a round, report it with `found` and wait for the next.

        With several processes rank 0 reports, and a barrier starts the next round on all of them.
        """
        self.left -= 1
        if self.left:
            return
        if os.environ.get("RANK", "0") == "0":
            self._report(found)
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.warm, self.left = True, self.steps
        self._began, self._used = time.perf_counter(), _processor_seconds()

    def _report(self, found: Mapping[str, float]) -> None:
        wait_for_device()
        if self.warm:
            wall, cpu = time.perf_counter() - self._began, _processor_seconds() - self._used
            report = {"wall": wall, "cpu": cpu, "peak_mb": _peak_memory(), **found}
        else:
            report = {}
        print(json.dumps(report), file=self._out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # skip the rest of the training program

    def follow(self, story: Any) -> None:
        """Count the steps of cifar_dist.training.run."""
        train_epoch = story.train_epoch

        def counted(*arguments: Any) -> Iterator[None]:
            for step in train_epoch(*arguments):
                yield step
                self.tick()

        story.train_epoch = counted


def wait_for_device() -> None:
    """Synchronise the GPU, if this process uses one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak_memory() -> float:
    """Return the peak resident memory of this process in MB."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    # On Linux, getrusage includes the peak of the parent before exec.
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _processor_seconds() -> float:
    """Return the CPU seconds of this process and its descendants."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes)


@dataclass
class Subject:
    """A program to measure.

    Attributes:
        name: of its row in the table.
        arguments: of `python`.
        environment: variables to add to this process's environment.
        ready: seconds from its start to the end of the warm-up.
    """

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str] | None = None
    ready: float = 0.0

    def prepare(self) -> None:
        """Start the program and wait for its warm-up."""
        began = time.perf_counter()
        self.start()
        self.wait()
        self.ready = time.perf_counter() - began

    def start(self) -> None:
        """Start the program; the first `wait` returns after its warm-up."""
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            env={**os.environ, **(self.environment or {})},
        )

    def stop(self) -> None:
        """Kill the program, if it was started."""
        if hasattr(self, "process"):
            self.process.kill()
            self.process.communicate()
            self.stderr.close()

    def wait(self) -> dict[str, float]:
        """Wait for the end of the current round and return its report."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.stderr.seek(0)
            print(self.stderr.read()[-3000:], file=sys.stderr)
            raise SystemExit(f"the subject '{self.name}' exited with code {self.process.wait()}")
        report: dict[str, float] = json.loads(line)
        return report

    def go(self) -> dict[str, float]:
        """Run one round and return its report."""
        print(file=self.process.stdin, flush=True)
        return self.wait()


Rounds = dict[str, list[dict[str, float]]]


def measure(
    subjects: Sequence[Subject], rounds: int, after_round: Callable[[Rounds], None] = lambda _: None
) -> Rounds:
    """Run `rounds` rounds of all subjects, reversing their order each round.

    Args:
        after_round: called with all reports so far, to save results of long benchmarks.

    Returns:
        The reports of each subject, by name.
    """
    found: Rounds = {subject.name: [] for subject in subjects}
    try:
        # Warm up in parallel only if there are enough cores.
        many = (os.cpu_count() or 1) >= 4 * len(subjects)
        pool = ThreadPoolExecutor(len(subjects) if many else 1)
        for future in as_completed([pool.submit(subject.prepare) for subject in subjects]):
            future.result()
        os.sync()  # otherwise the kernel would write back data during the rounds
        for number in range(rounds):
            for subject in subjects if number % 2 else reversed(subjects):
                found[subject.name].append(subject.go())
            newest = {name: reports[-1] for name, reports in found.items()}
            print(f"round {number + 1} of {rounds}: {newest}", file=sys.stderr, flush=True)
            after_round(found)
    finally:
        for subject in subjects:
            subject.stop()
    return found


def paired(rounds: Rounds, name: str, reference: str, key: str = "wall") -> list[float]:
    """Return the ratio of `reference` to `name` in each round; above 1, `name` is faster."""
    pairs = zip(rounds[reference], rounds[name], strict=True)
    return [theirs[key] / ours[key] for theirs, ours in pairs]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return median and quartiles, such as "0.974 (0.961 to 0.988)"; below 4 values the range."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    few = [min(values), statistics.median(values), max(values)]
    low, middle, high = few if len(values) < 4 else statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def median(rounds: Rounds, name: str, key: str) -> float:
    """Return the median of a value over the rounds of a subject."""
    return statistics.median(report[key] for report in rounds[name])


def machine() -> dict[str, Any]:
    """Return the date, the hardware and the versions, to be stored with the results."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        lines = information.read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        processor = f"{processor}, {torch.cuda.get_device_name()}"
    return {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "versions": versions,
    }


def record(
    folder: Path, name: str, title: str, rows: Sequence[str], raw: Any, notes: str = ""
) -> None:
    """Write all values to NAME.json and the table to NAME.md in `folder`, and print the table."""
    facts = machine()
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    command = " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    text = "\n".join(
        [
            f"# {title}",
            f"`{command}`, {facts['date']}, {facts['cores']} cores of {facts['processor']}, "
            f"{facts['memory_gb']} GB, Python {facts['python']}, {versions}.",
            *([notes] if notes else []),
            "",
            *rows,
            "",
        ]
    )
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text(text)
    content = {"command": command, "machine": facts, "results": raw}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    print(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def best_of(function: Callable[[], object], times: int = 3) -> float:
    """Return the minimum time of a call in seconds, after one warm-up call."""
    function()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return min(taken)
