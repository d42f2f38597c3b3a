"""One and two processes against two runs that know nothing of each other, and what that predicts.

`python -m benchmarks.scaling [--model NAME] [--batch N] [--rounds N] [--root FOLDER]`

On a CPU, one thread a process. Two independent runs share the machine as two processes do, so what
two processes lack against them is what working together costs: all-reduces, and waiting for each
other. From the independent runs and from all-reduces alone a model predicts the step of two
processes; only where that is right does it say anything about more.
"""

import argparse
import math
from pathlib import Path

import numpy as np
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

LAUNCH = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
SIZES = (4, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes of an all-reduce
WARMUP = 4  # steps
TOLERANCE = 0.05  # of a prediction


class Together(Subject):
    """The same program twice at once, neither knowing of the other."""

    def start(self) -> None:
        """Start both."""
        self.runs = [Subject(self.name, self.arguments, self.environment) for _ in range(2)]
        for run in self.runs:
            run.start()

    def stop(self) -> None:
        """End both."""
        for run in getattr(self, "runs", []):
            run.stop()

    def wait(self) -> dict[str, float]:
        """Return a report whose rate is the mean of theirs."""
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


def all_reduce() -> None:
    """Seconds of an all-reduce of each size, on two processes that do nothing else."""
    torch.distributed.init_process_group("gloo")
    meter = Meter(steps=1, warmup=1)
    while True:
        found = {}
        for size in SIZES:
            tensor = torch.zeros(size // 4)
            torch.distributed.barrier()
            found[f"bytes_{size}"] = best_of(lambda t=tensor: torch.distributed.all_reduce(t), 9)
        meter.tick(**found)


class Counter:
    """Stands for a Meter and reports what a step of training sends."""

    def __init__(self, steps: int) -> None:
        self.meter, self.steps, self.seen = Meter(steps, warmup=WARMUP), steps, 0
        self.profile = torch.profiler.profile(record_shapes=True)

    def tick(self) -> None:
        """Count the collectives of `steps` steps, after those that warm up."""
        self.seen += 1
        if self.seen < WARMUP + self.steps:
            self.meter.tick()
        if self.seen == WARMUP:
            self.profile.start()
        if self.seen == WARMUP + self.steps:
            self.profile.stop()
            sizes = [
                4 * math.prod(shape)
                for event in self.profile.events() or []
                if event.name.startswith("gloo:")
                for shape in event.input_shapes
            ]
            found = {"collectives": len(sizes), "bytes": sum(sizes)}
            self.meter.tick(**{name: value / self.steps for name, value in found.items()})


class Model:
    """Seconds of a step on W processes, each with a core of its own.

    T(W) = c0 + c1 B / W + n (W - 1) latency + 2 (W - 1) / W bytes / bandwidth: the computation of a
    share of the batch, then n all-reduces round a ring. Nothing overlaps: on a CPU, who sends takes
    the core from the computation.

    Args:
        alone: seconds of a step of a single run, by its batch.
        sent: seconds of an all-reduce between two, by its bytes.
        collectives: all-reduces in a step.
        size: bytes of a step.
    """

    def __init__(
        self, alone: dict[int, float], sent: dict[int, float], collectives: float, size: float
    ) -> None:
        self.constant, self.per_image = _line(alone)
        self.latency, self.per_byte = _line(sent)  # 2 (W - 1) / W is 1 for two
        self.collectives, self.size = collectives, size

    def seconds(self, batch: int, processes: int) -> float:
        """Return the prediction for a global batch."""
        computation = self.constant + self.per_image * batch / processes
        latency = self.collectives * (processes - 1) * self.latency
        return computation + latency + 2 * (processes - 1) / processes * self.size * self.per_byte


def _line(seconds: dict[int, float]) -> tuple[float, float]:
    """Fit constant and slope; what is short counts as much as what is long."""
    values = np.array(list(seconds.values()))
    slope, constant = np.polyfit(list(seconds), values, 1, w=1 / values)
    return float(constant), float(slope)


def main() -> None:
    """Measure, and write results/scaling-MODEL-BATCH."""
    parser = argparse.ArgumentParser("benchmarks.scaling", description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=128, help="of the two processes together")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was found")
    parser.add_argument(
        "--subject", choices=["all-reduce", "communication"], help=argparse.SUPPRESS
    )
    add_options(parser)
    options = parser.parse_args()
    if options.subject == "all-reduce":
        all_reduce()
    elif options.subject == "communication":
        cifar_dist(Counter(options.steps), options, lean=False)  # type: ignore[arg-type]
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run all subjects and write what was found."""
    load(options)  # decoded before anything is measured
    batch, shape = options.batch, ["--model", options.model, "--steps", str(options.steps)]
    shape += same_places(options)
    one_thread = {"OMP_NUM_THREADS": "1"}

    def train(batch: int) -> list[str]:
        own = ["--batch", str(batch), "--warmup", str(WARMUP)]
        return ["-m", "benchmarks.peers", "cifar-dist", *shape, *own]

    def subject(name: str) -> Subject:
        own = ["-m", "benchmarks.scaling", "--subject", name, "--batch", str(batch)]
        return Subject(name, [*LAUNCH, *own, *shape])

    shares = [batch // 4, batch // 2, batch]
    pairs = {share: f"two runs of batch {share}" for share in shares}
    both, threads = f"two processes, batch {batch}", f"one process, two threads, batch {batch}"
    rounds = measure([subject("communication")], 1)
    rounds |= measure(
        [
            *(Together(name, train(share), one_thread) for share, name in pairs.items()),
            Subject(both, [*LAUNCH, *train(batch)]),
            Subject(threads, train(batch), {"OMP_NUM_THREADS": "2"}),
            subject("all-reduce"),
        ],
        options.rounds,
    )
    steps = {name: median(rounds, name, "wall") / options.steps for name in (*pairs.values(), both)}
    sent = {size: median(rounds, "all-reduce", f"bytes_{size}") for size in SIZES}
    counted = rounds["communication"][0]
    model = Model(
        {share: steps[name] for share, name in pairs.items()},
        sent,
        counted["collectives"],
        counted["bytes"],
    )
    error = model.seconds(batch, 2) / steps[both] - 1
    images = {name: 2 * share for share, name in pairs.items()} | {both: batch, threads: batch}
    equal = pairs[batch // 2]
    rows = [
        [
            name,
            f"{count * options.steps / median(rounds, name, 'wall'):.1f}",
            spread(paired(rounds, name, equal)) if count == batch else "",
            f"{1e3 * median(rounds, name, 'cpu') / count / options.steps:.2f}"
            if name != both
            else "",
            f"{median(rounds, name, 'peak_mb'):.0f}",
        ]
        for name, count in images.items()
    ]
    notes = [
        f"A step sends {counted['bytes'] / 1e6:.3f} MB in {counted['collectives']:.1f} "
        f"all-reduces. Between two processes these take {1e6 * model.latency:.0f} us and "
        f"{1e-9 / model.per_byte:.2f} GB/s; a step alone takes {1e3 * model.constant:.1f} ms and "
        f"{1e3 * model.per_image:.3f} ms an image. From that a step of two processes is predicted "
        f"to take {1e3 * model.seconds(batch, 2):.1f} ms; it took {1e3 * steps[both]:.1f} "
        f"({100 * error:+.1f} %).",
    ]
    if abs(error) <= TOLERANCE:
        rates = [f"{w}: {batch / model.seconds(batch, w):.0f}" for w in (1, 2, 4, 8, 16)]
        weak = [f"{w}: {w * batch / 2 / model.seconds(w * batch // 2, w):.0f}" for w in (4, 8, 16)]
        notes.append(
            f"With that, on processes that each have such a core and such a link, images/s at "
            f"batch {batch}: {', '.join(rates)}; at batch {batch // 2} each: {', '.join(weak)}."
        )
    else:
        notes.append("That is not good enough to say anything about more processes.")
    record(
        options.results,
        f"scaling-{options.model}-{batch}",
        f"{options.model}: two processes, {options.rounds} rounds of {options.steps} steps",
        table(["", "images/s", f"of {equal}", "CPU ms an image", "peak MB"], rows),
        {"batch": batch, "steps": options.steps, "error": error, "rounds": rounds},
        "\n".join(notes),
    )


if __name__ == "__main__":
    main()
