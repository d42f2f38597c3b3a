"""Measure scaling to two processes on a CPU, and fit a model that predicts more processes.

`python -m benchmarks.scaling [--model NAME] [--batch N] [--rounds N] [--root FOLDER]`

Each process has one thread. Two independent runs share the machine as two processes do, so the
difference between them is the cost of synchronisation: waiting for each other, and sending
gradients. Two runs that wait for each other at every step, without sending, show the first: on a
machine whose cores differ in speed, the slower one determines the pace. From these runs and from
all-reduces alone, a model predicts each round's step of two processes. It extrapolates only if the
median of its errors is small.
"""

import argparse
import math
import os
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed
import torch.profiler

from benchmarks.data import add_options, load, same_places
from benchmarks.harness import (
    RESULTS,
    Meter,
    Subject,
    best_of,
    measure,
    median,
    paired,
    record,
    spread,
    table,
)
from benchmarks.peers import cifar_dist
from cifar_dist.launching.forecast import fit_line, step_seconds

LAUNCH = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
SIZES = (4, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes of an all-reduce
WARMUP = 4  # steps
COUNTS = 5  # rounds of counting the bytes sent; the most frequent result is used
TOLERANCE = 0.05  # relative error of a usable prediction


class Together(Subject):
    """Two programs that run at the same time, with one thread each."""

    def __init__(self, name: str, first: list[str], second: list[str]) -> None:
        super().__init__(name, first)
        self.runs = [Subject(name, own, {"OMP_NUM_THREADS": "1"}) for own in (first, second)]

    def start(self) -> None:
        """Start both programs."""
        for run in self.runs:
            run.start()

    def stop(self) -> None:
        """Kill both programs."""
        for run in self.runs:
            run.stop()

    def wait(self) -> dict[str, float]:
        """Return a report with the mean of both rates."""
        first, second = (run.wait() for run in self.runs)
        if not first:
            return first
        return {
            "wall": 2 / (1 / first["wall"] + 1 / second["wall"]),
            "cpu": first["cpu"] + second["cpu"],
            "peak_mb": first["peak_mb"] + second["peak_mb"],
        }

    def go(self) -> dict[str, float]:
        """Run one round of both."""
        for run in self.runs:
            print(file=run.process.stdin, flush=True)
        return self.wait()


class InStep(Meter):
    """A Meter that synchronises with another run at every step, by one byte in each direction.

    Args:
        places: named pipes; this run reads the first and writes the second.
    """

    def __init__(self, steps: int, places: list[Path]) -> None:
        super().__init__(steps, WARMUP)
        self.own, self.other = (os.open(place, os.O_RDWR) for place in places)

    def tick(self, **found: float) -> None:
        """Wait for the other run, then count the step."""
        os.write(self.other, b".")
        os.read(self.own, 1)
        super().tick(**found)


def all_reduce() -> None:
    """Time all-reduces of each size, on two processes that do nothing else."""
    torch.distributed.init_process_group("gloo")
    meter = Meter(steps=1, warmup=1)
    while True:
        found = {}
        for size in SIZES:
            tensor = torch.zeros(size // 4)
            torch.distributed.barrier()
            found[f"bytes_{size}"] = best_of(lambda t=tensor: torch.distributed.all_reduce(t), 9)
        meter.tick(**found)


class Counter(Meter):
    """A Meter that reports the collectives and bytes of a training step, from torch's profiler.

    In about one round of four the profiler misses events of a gloo thread, or includes the end of
    the previous round.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(steps, WARMUP)

    def tick(self, **found: float) -> None:
        """Count a step and, after the warm-up, its collectives."""
        if self.warm and self.left == 1:
            self.profile.stop()
            sizes = [
                4 * math.prod(shape)
                for event in self.profile.events() or []
                if event.name.startswith("gloo:")
                for shape in event.input_shapes
            ]
            found = {"collectives": len(sizes) / self.steps, "bytes": sum(sizes) / self.steps}
        super().tick(**found)
        if self.warm and self.left == self.steps:
            self.profile = torch.profiler.profile(record_shapes=True)
            self.profile.start()


class Model:
    """Model of the step time on W processes, each with its own core.

    T(W) = c0 + c1 B / W + n (W - 1) latency + 2 (W - 1) / W bytes / bandwidth: the computation of
    1 / W of the batch, then n ring all-reduces. Nothing overlaps: on a CPU, communication takes the
    core from the computation.

    Args:
        alone: seconds of a step without communication, by batch size.
        sent: seconds of an all-reduce between two processes, by bytes.
        collectives: all-reduces per step.
        size: bytes per step.
    """

    def __init__(
        self, alone: dict[int, float], sent: dict[int, float], collectives: float, size: float
    ) -> None:
        self.constant, self.per_image = fit_line(alone)
        self.latency, self.per_byte = fit_line(sent)  # 2 (W - 1) / W is 1 for two
        self.collectives, self.size = collectives, size

    def seconds(self, batch: int, processes: int) -> float:
        """Return the predicted seconds of a step for a global batch."""
        computation = self.constant + self.per_image * batch / processes
        link = (self.latency, 1 / self.per_byte)
        return step_seconds(computation, self.collectives, self.size, processes, link)


def main() -> None:
    """Measure, and write results/scaling-MODEL-BATCH.md and .json."""
    parser = argparse.ArgumentParser("benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128, help="global batch of the two processes")
    parser.add_argument("--rounds", type=int, default=0, help="default: 27, or 9 if a step is long")
    parser.add_argument("--steps", type=int, default=0, help="per round; default: 8 or 2")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    hidden = ["all-reduce", "communication", "in-step"]
    parser.add_argument("--subject", choices=hidden, help=argparse.SUPPRESS)
    parser.add_argument("--pipes", type=Path, nargs=2, help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    # Rounds of one or two seconds: in short rounds the speed of the machine drifts less.
    small = options.model == "tutorial"
    options.steps = options.steps or (8 if small else 2)
    options.rounds = options.rounds or (27 if small else 9)
    if options.subject == "all-reduce":
        all_reduce()
    elif options.subject == "in-step":
        cifar_dist(InStep(options.steps, options.pipes), options, lean=False)
    elif options.subject == "communication":
        cifar_dist(Counter(options.steps), options, lean=False)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run all subjects and write the results."""
    load(options)  # decode the images before measuring
    batch = options.batch
    common = ["--model", options.model, "--steps", str(options.steps), *same_places(options)]

    def train(batch: int) -> list[str]:
        own = ["--batch", str(batch), "--warmup", str(WARMUP)]
        return ["-m", "benchmarks.peers", "cifar-dist", *common, *own]

    def subject(name: str, batch: int, *own: str) -> list[str]:
        shape = ["--subject", name, "--batch", str(batch), *own]
        return ["-m", "benchmarks.scaling", *common, *shape]

    alone = f"two runs of batch {batch // 2}"
    waiting = {share: f"the same of {share}, in step" for share in (batch // 4, batch // 2, batch)}
    both, threads = f"two processes, batch {batch}", f"one process, two threads, batch {batch}"
    communication = Subject("communication", [*LAUNCH, *subject("communication", batch)])
    rounds = measure([communication], COUNTS)
    with tempfile.TemporaryDirectory() as folder:
        in_step = {}
        for share, name in waiting.items():
            pipes = [f"{folder}/{share}-{side}" for side in "ab"]
            for pipe in pipes:
                os.mkfifo(pipe)
            ways = (subject("in-step", share, "--pipes", *way) for way in (pipes, pipes[::-1]))
            in_step[share] = Together(name, *ways)
        rounds |= measure(
            [  # subjects that are compared with each other run next to each other
                in_step[batch // 4],
                in_step[batch],
                Together(alone, train(batch // 2), train(batch // 2)),
                in_step[batch // 2],
                Subject(both, [*LAUNCH, *train(batch)]),
                Subject("all-reduce", [*LAUNCH, *subject("all-reduce", batch)]),
                Subject(threads, train(batch), {"OMP_NUM_THREADS": "2"}),
            ],
            options.rounds,
        )
    counts = [(report["collectives"], report["bytes"]) for report in rounds["communication"]]
    collectives, sent = statistics.mode(counts)
    models = [
        Model(
            {share: rounds[name][row]["wall"] / options.steps for share, name in waiting.items()},
            {size: rounds["all-reduce"][row][f"bytes_{size}"] for size in SIZES},
            collectives,
            sent,
        )
        for row in range(options.rounds)
    ]

    def predicted(batch: int, processes: int) -> float:
        return statistics.median(model.seconds(batch, processes) for model in models)

    steps = [report["wall"] / options.steps for report in rounds[both]]
    pairs = zip(models, steps, strict=True)
    errors = [model.seconds(batch, 2) / seconds - 1 for model, seconds in pairs]
    error = statistics.median(errors)
    fitted = {
        name: statistics.median(getattr(model, name) for model in models)
        for name in ("latency", "per_byte", "constant", "per_image")
    }
    images = {alone: batch} | {name: 2 * share for share, name in waiting.items()}
    images |= {both: batch, threads: batch}
    rows = [
        [
            name,
            f"{count * options.steps / median(rounds, name, 'wall'):.1f}",
            spread(paired(rounds, name, alone)) if count == batch else "",
            f"{1e3 * median(rounds, name, 'cpu') / count / options.steps:.2f}"
            if name != both
            else "",
            f"{median(rounds, name, 'peak_mb'):.0f}",
        ]
        for name, count in images.items()
    ]
    notes = [
        f"A step sends {sent / 1e6:.3f} MB in {collectives:.1f} all-reduces. Fitted for two "
        f"processes: latency {1e6 * fitted['latency']:.0f} us, bandwidth "
        f"{1e-9 / fitted['per_byte']:.2f} GB/s, computation {1e3 * fitted['constant']:.1f} ms per "
        f"step and {1e3 * fitted['per_image']:.3f} ms per image. The predicted step of two "
        f"processes is {1e3 * predicted(batch, 2):.1f} ms; the measured one is "
        f"{1e3 * statistics.median(steps):.1f} ms. The error of the prediction is "
        f"{spread([100 * each for each in errors], 1)} %.",
    ]
    if abs(error) <= TOLERANCE:
        rates = [f"{w}: {batch / predicted(batch, w):.0f}" for w in (1, 2, 4, 8, 16)]
        weak = [f"{w}: {w * batch / 2 / predicted(w * batch // 2, w):.0f}" for w in (4, 8, 16)]
        notes.append(
            f"Predicted images/s by number of processes, each with such a core and such a link: "
            f"at batch {batch}: {', '.join(rates)}; at batch {batch // 2} per process: "
            f"{', '.join(weak)}."
        )
    else:
        notes.append("The error is too large to predict more processes.")
    record(
        options.results,
        f"scaling-{options.model}-{batch}",
        f"{options.model}: two processes, {options.rounds} rounds of {options.steps} steps",
        table(["", "images/s", f"relative to {alone}", "CPU ms per image", "peak MB"], rows),
        {"batch": batch, "steps": options.steps, "error": error, "rounds": rounds},
        "\n".join(notes),
    )


if __name__ == "__main__":
    main()
