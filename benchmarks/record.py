"""`cifar10-94` against airbench94 with Muon: accuracy and what it costs, on the same files.

`python -m benchmarks.record --airbench airbench94_muon.py [--runs N] [--root FOLDER]`

airbench's script is not on the package index: take it from its repository. On a GPU it runs as it
is; on a CPU it is told to use that, in float32 and without compiling. What counts is what its own
timer counts: whitening, training, and the evaluation with test-time augmentation.
"""

import argparse
import os
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.data import add_options, as_tensors, data_options, load, same_places
from benchmarks.harness import (
    RESULTS,
    Meter,
    Rounds,
    Subject,
    measure,
    paired,
    record,
    spread,
    table,
)

OURS, THEIRS = "cifar-dist, cifar10-94", "airbench94, Muon"
ON_GPU = torch.cuda.is_available()
TO_CPU = {
    "@torch.compile": "",
    'model.compile(mode="max-autotune")': "",
    ".bfloat16()": ".float()",
    ".half()": ".float()",
    'torch.device("cuda")': 'torch.device("cpu")',
    "torch.cuda.synchronize()": "",
}
Figures = dict[str, float]


class Stopwatch:
    """Adds up the wall and CPU seconds of spans."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def read(self) -> tuple[float, float]:
        """Return both clocks once the device has done what it was given."""
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def add(self, began: tuple[float, float], ended: tuple[float, float]) -> None:
        """Add a span."""
        self.wall += ended[0] - began[0]
        self.cpu += ended[1] - began[1]

    def time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, with its calls added."""

        def timed(*arguments: Any, **named: Any) -> Any:
            began = self.read()
            result = function(*arguments, **named)
            self.add(began, self.read())
            return result

        return timed

    def take(self) -> Figures:
        """Return what was added up, and start again."""
        found = {"train_wall": self.wall, "train_cpu": self.cpu}
        self.wall = self.cpu = 0.0
        return found


def cifar_dist(options: argparse.Namespace) -> Callable[[int], Figures]:
    """`cifar_dist.train.run` with the recipe as shipped."""
    from cifar_dist import engine
    from cifar_dist.config import parse_recipe
    from cifar_dist.models.speednet import SpeedNet
    from cifar_dist.train import run

    watch, plain = Stopwatch(), Figures()
    train, evaluate = engine.train_epoch, engine.evaluate
    timed_evaluate = watch.time(evaluate)

    def timed_epoch(*arguments: Any) -> Iterator[None]:
        began = watch.read()
        yield from train(*arguments)
        watch.add(began, watch.read())

    def both_evaluations(*arguments: Any, **named: Any) -> Any:
        result = evaluate(*arguments, **{**named, "tta": "none"})
        assert result is not None
        plain["plain"] = result.totals.correct / result.totals.count
        return timed_evaluate(*arguments, **named)

    engine.train_epoch, engine.evaluate = timed_epoch, both_evaluations
    SpeedNet.whiten = watch.time(SpeedNet.whiten)  # type: ignore[method-assign]
    epochs = ["--train.epochs", str(options.epochs)] if options.epochs else []

    def one(seed: int) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--train.seed", str(seed), "--out", f"{folder}/run", *epochs]
            recipe, _ = parse_recipe(["--config", "cifar10-94", *data_options(options), *own])
            accuracy = run(recipe).metrics["test"]["accuracy"]
        return {"accuracy": accuracy, **plain, **watch.take()}

    return one


def airbench(options: argparse.Namespace) -> Callable[[int], Figures]:
    """airbench94_muon.py: its `main`, once a run, in a folder with cifar10/train.pt and test.pt."""
    watch, last = Stopwatch(), dict[str, Any]()

    class Event:
        """Stands for torch.cuda.Event, and knows the CPU seconds too."""

        def record(self) -> None:
            self.at = watch.read()

        def elapsed_time(self, end: Any) -> float:
            watch.add(self.at, end.at)
            return 0.0

    changes = {"torch.cuda.Event(enable_timing=True)": "Event()"} | ({} if ON_GPU else TO_CPU)
    if options.epochs:
        changes["total_train_steps = ceil(8 *"] = f"total_train_steps = ceil({options.epochs} *"
    source = options.airbench.read_text()
    for theirs, ours in changes.items():
        if theirs not in source:
            raise SystemExit(f"{options.airbench} has no '{theirs}': is it another version?")
        source = source.replace(theirs, ours)
    script: Any = types.ModuleType("airbench94_muon")
    exec(compile(source, str(options.airbench), "exec"), script.__dict__)
    script.Event = Event
    script.print_training_details = lambda variables, is_final_entry: last.update(variables)
    network = script.CifarNet().to(memory_format=torch.channels_last)
    if ON_GPU:
        network = network.cuda()
        network.compile(mode="max-autotune")
    folder = Path(tempfile.mkdtemp()) / "cifar10"
    folder.mkdir()
    dataset = load(options)
    for split in ("train", "test"):
        images, labels = as_tensors(dataset, split)
        content = {"images": images, "labels": labels, "classes": list(dataset.classes)}
        torch.save(content, folder / f"{split}.pt")

    def one(seed: int) -> Figures:
        os.chdir(folder.parent)
        torch.manual_seed(seed)
        script.main(seed, network)
        return {"accuracy": last["tta_val_acc"], "plain": last["val_acc"], **watch.take()}

    return one


def serve(options: argparse.Namespace) -> None:
    """Run once a round, until the harness ends this process; on a GPU once before, to warm up."""
    meter = Meter(steps=1, warmup=1)
    one = (cifar_dist if options.subject == "cifar-dist" else airbench)(options)
    seed, found = 0, one(0) if ON_GPU else Figures()
    while True:
        meter.tick(**found)
        seed += 1
        found = one(seed)


def main() -> None:
    """Measure, and write results/record."""
    parser = argparse.ArgumentParser("benchmarks.record", description=__doc__)
    parser.add_argument("--airbench", type=Path, required=True, help="airbench94_muon.py")
    parser.add_argument("--runs", type=int, default=2, help="of each")
    parser.add_argument("--epochs", type=int, help="instead of 8, to try this out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was found")
    parser.add_argument("--subject", choices=["cifar-dist", "airbench"], help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.airbench = options.airbench.resolve()
    for place in ("root", "cache"):  # a subject changes its folder
        if getattr(options, place):
            setattr(options, place, str(Path(getattr(options, place)).resolve()))
    if options.subject:
        serve(options)
        return
    load(options)  # decoded before anything is measured
    own = ["--airbench", str(options.airbench), *same_places(options)]
    own += ["--epochs", str(options.epochs)] if options.epochs else []
    module = ["-m", "benchmarks.record", "--subject"]
    subjects = [
        Subject(OURS, [*module, "cifar-dist", *own]),
        Subject(THEIRS, [*module, "airbench", *own]),
    ]
    measure(subjects, options.runs, lambda rounds: write(options, rounds))


def write(options: argparse.Namespace, rounds: Rounds) -> None:
    """Write results/record-cpu or record-gpu."""

    def digits(name: str, key: str, scale: float, places: int) -> str:
        values = [scale * report[key] for report in rounds[name]]
        deviation = f" (sd {statistics.stdev(values):.{places}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{places}f}{deviation}"

    rows = [
        [
            name,
            digits(name, "accuracy", 100, 2),
            digits(name, "plain", 100, 2),
            *(digits(name, f"train_{clock}", 1, 1) for clock in ("wall", "cpu")),
            *(spread(paired(rounds, THEIRS, name, f"train_{clock}")) for clock in ("wall", "cpu")),
        ]
        for name in (OURS, THEIRS)
    ]
    head = ["", "accuracy with TTA", "without", "seconds", "CPU seconds", "of airbench's seconds"]
    record(
        options.results,
        "record-gpu" if ON_GPU else "record-cpu",
        f"94 % on CIFAR-10, {len(rounds[OURS])} runs each",
        table([*head, "of its CPU seconds"], rows),
        {"epochs": options.epochs or 8, "rounds": rounds},
        "Seconds are of whitening, training and the evaluation with test-time augmentation.",
    )


if __name__ == "__main__":
    main()
