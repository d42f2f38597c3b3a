"""Compare `cifar10-94` with the record holders: accuracy and training time on the same images.

`python -m benchmarks.record --airbench airbench94_muon.py [--successor cifar10_speedrun.py]
[--runs N] [--root FOLDER]`

The scripts are not on PyPI: download them from the repositories KellerJordan/cifar10-airbench and
hiverge/cifar10-speedrun. On a GPU they run unchanged. For a CPU they are changed to use it, in
float32 and without compilation. The measured time is that of their own timers: whitening,
training, and the evaluation with test-time augmentation.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    wait_for_device,
)

OURS = "cifar-dist, cifar10-94"
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Script:
    """A script of a record holder.

    Attributes:
        row: its name in the table.
        epochs: the number of epochs, as written in its source.
        to_cpu: replacements of source text, for a CPU.
    """

    row: str
    epochs: str
    to_cpu: dict[str, str]


SCRIPTS = {
    "airbench": Script(
        "airbench94, Muon",
        "8",
        {
            "@torch.compile": "",
            ".bfloat16()": ".float()",
            ".half()": ".float()",
            'torch.device("cuda")': 'torch.device("cpu")',
            "torch.cuda.synchronize()": "",
        },
    ),
    "successor": Script(
        "cifar10_speedrun",
        "7.63",
        {
            "@torch.compile(fullgraph=True)": "",
            '@torch.compile(mode="max-autotune")': "",
            "@torch.compile": "",
            "torch.half": "torch.float",
            ".half()": ".float()",
            'torch.device("cuda")': 'torch.device("cpu")',
            "torch.cuda.synchronize()": "",
            "torch.cuda.empty_cache()": "",
        },
    ),
}
Figures = dict[str, float]


class Stopwatch:
    """Sum of the wall and CPU seconds of several spans."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def read(self) -> tuple[float, float]:
        """Synchronise the device and return wall and CPU seconds."""
        wait_for_device()
        return time.perf_counter(), time.process_time()

    def add(self, began: tuple[float, float], ended: tuple[float, float]) -> None:
        """Add a span."""
        self.wall += ended[0] - began[0]
        self.cpu += ended[1] - began[1]

    def time(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, wrapped to add the time of its calls."""

        def timed(*arguments: Any, **named: Any) -> Any:
            began = self.read()
            result = function(*arguments, **named)
            self.add(began, self.read())
            return result

        return timed

    def take(self) -> Figures:
        """Return the sums and reset them."""
        found = {"train_wall": self.wall, "train_cpu": self.cpu}
        self.wall = self.cpu = 0.0
        return found


def cifar_dist(options: argparse.Namespace) -> Callable[[int], Figures]:
    """Return a function that trains the shipped recipe with a seed."""
    from cifar_dist.config import parse_recipe
    from cifar_dist.models.speednet import SpeedNet
    from cifar_dist.train import run
    from cifar_dist.training import run as story

    watch, plain = Stopwatch(), Figures()
    train, evaluate = story.train_epoch, story.evaluate
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

    story.train_epoch, story.evaluate = timed_epoch, both_evaluations
    SpeedNet.initialise_from = watch.time(  # type: ignore[method-assign]
        SpeedNet.initialise_from
    )
    epochs = ["--train.epochs", str(options.epochs)] if options.epochs else []

    def one(seed: int) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            own = ["--train.seed", str(seed), "--out", f"{folder}/run", *epochs]
            recipe, _ = parse_recipe(["--config", "cifar10-94", *data_options(options), *own])
            accuracy = run(recipe).metrics["test"]["accuracy"]
        return {"accuracy": accuracy, **plain, **watch.take()}

    return one


def theirs(options: argparse.Namespace) -> Callable[[int], Figures]:
    """Return a function that calls a script's `main`, in a folder with cifar10/{train,test}.pt."""
    script, path = SCRIPTS[options.subject], getattr(options, options.subject)
    watch, last = Stopwatch(), dict[str, Any]()

    class Event:
        """Replacement of torch.cuda.Event that also measures CPU seconds."""

        def record(self) -> None:
            self.at = watch.read()

        def elapsed_time(self, end: Any) -> float:
            watch.add(self.at, end.at)
            return 0.0

    changes = {"torch.cuda.Event(enable_timing=True)": "Event()"}
    changes |= {} if ON_GPU else script.to_cpu
    if options.epochs:
        steps = "total_train_steps = ceil({} *"
        changes[steps.format(script.epochs)] = steps.format(options.epochs)
    source = path.read_text()
    for old, new in changes.items():
        if old not in source:
            raise SystemExit(f"{path} does not contain '{old}'; it may be another version")
        source = source.replace(old, new)
    module: Any = types.ModuleType(options.subject)
    sys.modules[options.subject] = module  # torch.compile imports it by name
    exec(compile(source, str(path), "exec"), module.__dict__)
    module.Event = Event
    module.print_training_details = lambda variables, is_final_entry: last.update(variables)
    network = module.CifarNet().to(memory_format=torch.channels_last)
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
        module.main(seed, network)
        return {"accuracy": last["tta_val_acc"], "plain": last["val_acc"], **watch.take()}

    return one


def serve(options: argparse.Namespace) -> None:
    """Train once per round until the harness kills this process. On a GPU, warm up with one run."""
    meter = Meter(steps=1, warmup=1)
    one = (cifar_dist if options.subject == "cifar-dist" else theirs)(options)
    seed, found = 0, one(0) if ON_GPU else Figures()
    while True:
        meter.tick(**found)
        seed += 1
        found = one(seed)


def main() -> None:
    """Measure, and write results/record-cpu or record-gpu, as .md and .json."""
    parser = argparse.ArgumentParser("benchmarks.record", description=__doc__)
    parser.add_argument("--airbench", type=Path, required=True, help="airbench94_muon.py")
    parser.add_argument("--successor", type=Path, help="cifar10_speedrun.py")
    parser.add_argument("--runs", type=int, default=2, help="of each subject")
    parser.add_argument("--epochs", type=int, help="of each subject, for a quick test")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--subject", choices=["cifar-dist", *SCRIPTS], help=argparse.SUPPRESS)
    add_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for place in ("root", "cache", *SCRIPTS):  # absolute paths: a subject changes its directory
        if getattr(options, place):
            setattr(options, place, Path(getattr(options, place)).resolve())
    options.root, options.cache = (str(p) if p else None for p in (options.root, options.cache))
    if options.subject:
        serve(options)
        return
    load(options)  # decode the images before measuring
    scripts = [name for name in SCRIPTS if getattr(options, name)]
    own = same_places(options)
    for name in scripts:
        own += [f"--{name}", str(getattr(options, name))]
    own += ["--epochs", str(options.epochs)] if options.epochs else []
    subjects = [
        Subject(row, ["-m", "benchmarks.record", "--subject", name, *own])
        for name, row in [("cifar-dist", OURS), *((name, SCRIPTS[name].row) for name in scripts)]
    ]
    measure(subjects, options.runs, lambda rounds: write(options, subjects, rounds))


def write(options: argparse.Namespace, subjects: Sequence[Subject], rounds: Rounds) -> None:
    """Write the results of all rounds."""

    def digits(name: str, key: str, scale: float, places: int) -> str:
        values = [scale * report[key] for report in rounds[name]]
        deviation = f" (sd {statistics.stdev(values):.{places}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{places}f}{deviation}"

    rows = [
        [
            subject.name,
            digits(subject.name, "accuracy", 100, 2),
            digits(subject.name, "plain", 100, 2),
            digits(subject.name, "train_wall", 1, 3 if ON_GPU else 1),
            digits(subject.name, "train_cpu", 1, 1),
            spread(paired(rounds, subject.name, OURS, "train_wall")),
            spread(paired(rounds, subject.name, OURS, "train_cpu")),
            f"{subject.ready:.1f}",
        ]
        for subject in subjects
    ]
    head = ["", "accuracy with TTA", "without TTA", "seconds", "CPU seconds"]
    head += ["cifar-dist's seconds / these", "its CPU seconds / these", "ready after"]
    ready = "importing and loading"
    if ON_GPU:
        ready = "importing, loading, compiling and one full run, for cifar-dist with checkpoint"
    record(
        options.results,
        "record-gpu" if ON_GPU else "record-cpu",
        f"94 % on CIFAR-10, {len(rounds[OURS])} runs each",
        table(head, rows),
        {
            "epochs": options.epochs,  # null: each subject's own number
            "ready": {subject.name: subject.ready for subject in subjects},
            "rounds": rounds,
        },
        "Seconds are those of whitening, training and the evaluation with test-time augmentation "
        f"(TTA). `Ready after` is the time for {ready}.",
    )


if __name__ == "__main__":
    main()
