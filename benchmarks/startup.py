"""From the command to the first step, and what of that is imports, the launcher and the rest.

`python -m benchmarks.startup [--rounds N] [--root FOLDER]`

Each start is a process of its own, timed from outside: to its end, or to the end of its first
optimizer step. The images are decoded by then. What a launcher holds while training runs is last.
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
COMMANDS = {  # the last is refused
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
    """A subject that is started anew for each round.

    Attributes:
        code: it ends with.
        steps: a round is over with its first step, not with its end.
    """

    code: int = 0
    steps: bool = False

    def start(self) -> None:
        """Leave that to the rounds."""

    def wait(self) -> dict[str, float]:
        """Start once, which does not count: it decodes the images and fills the page cache."""
        return self.go()

    def go(self) -> dict[str, float]:
        """Start, and return the seconds until the round is over, and CPU seconds to the end."""
        began, used = time.perf_counter(), _children_seconds()
        super().start()
        if self.steps:
            super().wait()
        else:
            self.process.communicate()
        wall = time.perf_counter() - began
        self.process.communicate()  # closes its input, which ends it after its first step
        if self.process.returncode != self.code:
            raise SystemExit(f"'{self.name}' ended with code {self.process.returncode}")
        self.stop()
        return {"wall": wall, "cpu": _children_seconds() - used}


def _children_seconds() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def train(steps: int, arguments: Sequence[str]) -> None:
    """`cifar-dist train` itself, stopped after its first step, and then after every `steps`."""
    meter = Meter(steps, warmup=1)
    from cifar_dist import train as program

    begin = program._train

    def measured(*given: Any) -> bool:
        from cifar_dist.training import run  # not before the program itself imports torch

        meter.follow(run)
        return begin(*given)

    program._train = measured
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(program.main([*arguments, "--out", f"{folder}/run"]))


def watch(launched: Subject) -> dict[str, float]:
    """Return what a launcher itself uses during a round of what it has launched."""
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
    """Say of each of LARGE whether a program imports it."""
    command = [sys.executable, "-X", "importtime", *arguments]
    lines = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    names = {line.rpartition("|")[2].strip() for line in lines}
    return ["yes" if package in names else "no" for package in LARGE]


def main() -> None:
    """Measure, and write results/startup."""
    parser = argparse.ArgumentParser("benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200, help="during which a launcher is watched")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was found")
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    if options.train:
        train(int(options.train[0]), options.train[1:])
    step = [*TRAIN, str(options.steps), "--config", "tutorial", *data_options(options)]
    with tempfile.TemporaryDirectory() as folder:
        places = {"TMPDIR": folder}  # run folders go there: who is ended leaves its own behind
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
    head = ["", "seconds", "CPU seconds", "of `import torch`'s seconds", "of its CPU seconds"]
    record(
        options.results,
        "startup",
        f"From command to first step, {options.rounds} rounds",
        [*table(head, rows), "", "What is imported:", "", *table(["", *LARGE], answers)],
        {"rounds": rounds, "launcher": launcher, "imports": answers},
        "Seconds of a new process, to its end or to the end of its first optimizer step (recipe "
        "tutorial, images decoded before); CPU seconds with those of what it starts, to its end. "
        f"While {options.steps} steps of training ran for {launcher['wall']:.1f} s, the launcher "
        f"itself held {launcher['resident_mb']:.0f} MB and used {launcher['cpu']:.2f} CPU seconds.",
    )


if __name__ == "__main__":
    main()
