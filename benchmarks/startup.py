"""Measure the start-up time to the first step, and the parts of imports and launcher.

`python -m benchmarks.startup [--rounds N] [--root FOLDER]`

Each start is a new process, timed from outside to its end or to the end of its first optimizer
step, with the images already decoded. The memory and CPU time of a launcher during training are
measured last.
"""

import argparse
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data import add_options, data_options
from benchmarks.harness import (
    RESULTS,
    Meter,
    Subject,
    measure,
    median,
    paired,
    record,
    spread,
    table,
)

LAUNCH = [
    *("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
]
TRAIN = ("-m", "benchmarks.startup", "--train")  # then steps, and options of cifar-dist train
COMMANDS = {  # the last has an unknown option and exits with 2
    shlex.join(["python", *arguments]): arguments
    for arguments in (
        *(["-c", "pass"], ["-c", "import torch"], ["-c", "import torch, torchvision, accelerate"]),
        *(["-c", "import cifar_dist.train"], ["-m", "cifar_dist", "--help"]),
        *(["-m", "cifar_dist.train", "--help"], ["-m", "cifar_dist.train", "--data.rot", "photos"]),
    )
}
LARGE = ("torch", "torchvision", "accelerate", "tensorboard", "numpy", "PIL")


@dataclass
class Start(Subject):
    """A subject that is a new process in each round.

    Attributes:
        code: expected exit code.
        steps: whether a round ends with the first step, rather than with the process.
    """

    code: int = 0
    steps: bool = False

    def start(self) -> None:
        """Do nothing: each round starts the process."""

    def wait(self) -> dict[str, float]:
        """Start once to warm up: this decodes the images and fills the page cache."""
        return self.go()

    def go(self) -> dict[str, float]:
        """Start, and return the seconds to the end of the round and the process's CPU seconds."""
        began, used = time.perf_counter(), _children_seconds()
        super().start()
        if self.steps:
            super().wait()
        else:
            self.process.communicate()
        wall = time.perf_counter() - began
        self.process.communicate()  # closes its stdin, which ends it after its first step
        if self.process.returncode != self.code:
            raise SystemExit(f"'{self.name}' exited with code {self.process.returncode}")
        self.stop()
        return {"wall": wall, "cpu": _children_seconds() - used}


def _children_seconds() -> float:
    """Return the CPU seconds of all child processes that have exited."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def train(steps: int, arguments: Sequence[str]) -> None:
    """Run `cifar-dist train`, pausing after its first step and then after every `steps` steps."""
    meter = Meter(steps, warmup=1)
    from cifar_dist import train as program

    begin = program._train

    def measured(*given: Any) -> bool:
        from cifar_dist.training import run  # imports torch, so only after the program did

        meter.follow(run)
        return begin(*given)

    program._train = measured
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(program.main([*arguments, "--out", f"{folder}/run"]))


def watch(launched: Subject) -> dict[str, float]:
    """Return the launcher's wall and CPU seconds and memory during a round of training."""
    try:
        launched.start()
        launched.wait()
        launcher = psutil.Process(launched.process.pid)
        used = sum(launcher.cpu_times()[:2])
        wall = launched.go()["wall"]
        cpu = sum(launcher.cpu_times()[:2]) - used
        return {"wall": wall, "cpu": cpu, "resident_mb": launcher.memory_info().rss / (1 << 20)}
    finally:
        launched.stop()


def imports(arguments: Sequence[str]) -> list[str]:
    """Return "yes" or "no" for each package of LARGE: whether a program imports it."""
    command = [sys.executable, "-X", "importtime", *arguments]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines}
    return ["yes" if package in names else "no" for package in LARGE]


def main() -> None:
    """Measure, and write results/startup.md and .json."""
    parser = argparse.ArgumentParser("benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--steps", type=int, default=200, help="during which the launcher is measured"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.train:
        train(int(options.train[0]), options.train[1:])
    step = [*TRAIN, str(options.steps), "--config", "tutorial", *data_options(options)]
    with tempfile.TemporaryDirectory() as folder:
        places = {"TMPDIR": folder}  # for run folders, which killed subjects leave behind
        subjects = [Start(name, command) for name, command in COMMANDS.items()]
        subjects[-1].code = 2
        subjects += [
            Start("first step", step, places, steps=True),
            Start("first step under accelerate launch", [*LAUNCH, *step], places, steps=True),
        ]
        rounds = measure(subjects, options.rounds)
        launcher = watch(Subject("launcher", [*LAUNCH, *step], places))
    torch = "python -c 'import torch'"
    rows = [
        [
            name,
            *(f"{median(rounds, name, clock):.2f}" for clock in ("wall", "cpu")),
            *(spread(paired(rounds, torch, name, clock), 2) for clock in ("wall", "cpu")),
        ]
        for name in rounds
    ]
    answers = [[name, *imports(command)] for name, command in COMMANDS.items()]
    head = ["", "seconds", "CPU seconds", "seconds / `import torch`", "CPU / `import torch`"]
    record(
        options.results,
        "startup",
        f"From command to first step, {options.rounds} rounds",
        [*table(head, rows), "", "Imported packages:", "", *table(["", *LARGE], answers)],
        {"rounds": rounds, "launcher": launcher, "imports": answers},
        "Seconds of a new process, to its end or to the end of its first optimizer step (recipe "
        "tutorial, images already decoded). CPU seconds are to its end and include its children. "
        f"During {options.steps} steps of training ({launcher['wall']:.1f} s), the launcher used "
        f"{launcher['resident_mb']:.0f} MB and {launcher['cpu']:.2f} CPU seconds.",
    )


if __name__ == "__main__":
    main()
