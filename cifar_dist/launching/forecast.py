"""What a run will do, worked out from its recipe alone; tests compare it with what runs record."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cifar_dist.config import Recipe, local_path
from cifar_dist.data import Dataset
from cifar_dist.data.counts import count_images
from cifar_dist.errors import require
from cifar_dist.launching.networks import Features, Tape, Weight, describe_network
from cifar_dist.training.schedule import learning_rate, total_steps

MOMENTS = {
    "sgd": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("momentum_buffer",),
}
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes of gradients that DDP sends together
TALLY = 3  # numbers a process keeps of its epoch: metrics.Tally
FLAG = 4  # bytes by which processes agree on stopping, at each step: preemption.agreed
Entries = Sequence[tuple[str, str, tuple[int, ...]]]  # name, type, shape


@dataclass(frozen=True)
class Prediction:
    """What a run on so many processes will do.

    Attributes:
        processes: over all machines.
        dataset: its counts are those of the real one; it holds no pixels.
        steps_per_epoch, steps: optimizer steps.
        left_over: training images that fill no batch, in each epoch.
        rates: learning rate at the steps where it turns, counted from 1 as in metrics.jsonl.
        saves: steps after which a checkpoint is written; the best epochs' come on top.
        checkpoint: bytes of each of its safetensors files.
        disk: bytes that checkpoints take at most.
        parameters: trained ones.
        multiplications: of one image's forward pass, each with its addition.
        memory: bytes on each device, by what takes them; an estimate.
        sent: bytes of gradients and flags that each process gives to collectives in a step.
        collectives: all-reduces in a step.
    """

    processes: int
    dataset: Dataset
    steps_per_epoch: int
    steps: int
    left_over: int
    rates: dict[int, float]
    saves: list[int]
    checkpoint: dict[str, int]
    disk: int
    parameters: int
    multiplications: int
    memory: dict[str, int]
    sent: int
    collectives: int


def predict(recipe: Recipe, processes: int) -> Prediction:
    """Work out what a run of `recipe` will do.

    Raises:
        UsageError: the folder of images is missing, or smaller than a batch.
    """
    train, dataset = recipe.train, count_images(recipe.data)
    images = len(dataset.train)
    require(
        train.batch_size <= images,
        f"train.batch_size {train.batch_size} exceeds the {images} training images; give {images} "
        "or less",
    )
    per_epoch = images // train.batch_size
    steps = total_steps(train.epochs, per_epoch)
    network = describe_network(recipe.model, len(dataset.classes))
    weights = list(network.weights())
    trained = [weight for weight in weights if weight.trained]
    tape = Tape()
    network.forward(Features(3, dataset.train.image_size), tape)
    files = _files(recipe, weights, processes)
    checkpoint = {f"{name}.safetensors": file_size(entries) for name, entries in files.items()}
    at_once = recipe.checkpoint.keep + 1 + ("val" in dataset.evaluation)
    sizes = [weight.bytes // (2 if train.compress_gradients else 1) for weight in trained]
    part = train.batch_size // train.accumulate // processes
    if part == 1 and not train.sync_batchnorm:
        from cifar_dist.models import build_model, require_batchnorm_values

        built = build_model(recipe.model, len(dataset.classes))
        require_batchnorm_values(built, part, dataset.train.image_size)
    # Activations, as most of them are kept in the precision of the arithmetic.
    narrow = 2 if train.precision in ("bf16", "fp16") else 1
    gradients = sum(weight.bytes for weight in trained)
    return Prediction(
        processes=processes,
        dataset=dataset,
        steps_per_epoch=per_epoch,
        steps=steps,
        left_over=images - per_epoch * train.batch_size,
        rates=_rates(recipe, per_epoch),
        saves=_saves(recipe, per_epoch),
        checkpoint=checkpoint,
        disk=at_once * sum(checkpoint.values()),
        parameters=sum(weight.count for weight in trained),
        multiplications=tape.multiplications,
        memory={
            "weights": sum(weight.bytes for weight in weights) * (2 if train.ema else 1),
            "gradients": gradients,
            "optimizer": checkpoint["optim.safetensors"],
            "activations": part * tape.kept_bytes // narrow,
            "images": images * 3 * dataset.train.image_size**2,
        },
        sent=sum(sizes) + FLAG if processes > 1 else 0,
        collectives=len(list(_buckets(sizes))) + 1 if processes > 1 else 0,
    )


def step_seconds(
    computation: float, collectives: float, sent: float, processes: int, link: tuple[float, float]
) -> float:
    """Return the time of a step on a ring of processes; nothing overlaps, which is the worst case.

    Args:
        computation: seconds of a process's share of the batch.
        collectives, sent: all-reduces in a step, and their bytes.
        link: latency between two processes in seconds, and bytes a second.
    """
    latency, bandwidth = link
    waiting = collectives * (processes - 1) * latency
    return computation + waiting + 2 * (processes - 1) / processes * sent / bandwidth


def file_size(entries: Entries) -> int:
    """Return the bytes of a safetensors file: 8, a header in JSON, and the numbers."""
    widths = {"F32": 4, "F64": 8, "I64": 8}
    order = sorted(entries, key=lambda entry: (-list(widths).index(entry[1]), entry[0]))
    header: dict[str, Any] = {}
    end = 0
    for name, kind, shape in order:
        begin, end = end, end + widths[kind] * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + end


def read_link(path: str) -> tuple[float, float]:
    """Return latency in seconds and bytes a second from what `doctor --json` has printed.

    Raises:
        UsageError: it is not the output of a live doctor on several processes.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["all_reduce"]
        return float(found["latency_seconds"]), float(found["bytes_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        require(
            False,
            f"'{path}' is not what a live `doctor --json` on several processes prints ({error!r})",
        )
        raise AssertionError from error


def read_rate(path: str) -> float:
    """Return images a second of each process of a run, the median of what it has recorded.

    Raises:
        UsageError: it is no run folder, or has recorded none.
    """
    from cifar_dist.storage.folder import read_metrics

    folder, rate, reason = local_path(path), 0.0, ""
    try:
        lines = read_metrics(folder)
        rates = [line["images_per_second"] for line in lines if line["split"] == "train_window"]
        world = json.loads((folder / "run.json").read_text(encoding="utf-8"))["world_size"]
        if rates:
            rate = float(np.median(rates)) / float(world)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        reason = f" ({' '.join(str(error).split()) or type(error).__name__})"
    require(
        0 < rate < math.inf,
        f"'{path}' is not a run folder with recorded speeds{reason}; name one whose "
        "track.every_steps is not 0",
    )
    return rate


def _rates(recipe: Recipe, per_epoch: int) -> dict[int, float]:
    """Return the learning rate at the first step, the highest, the middle one and the last."""
    steps = total_steps(recipe.train.epochs, per_epoch)
    rates = [
        learning_rate(recipe.schedule, recipe.optim.lr, step, per_epoch, recipe.train.epochs)
        for step in range(steps)
    ]
    shown = sorted({0, int(np.argmax(rates)), steps // 2, steps - 1})
    return {step + 1: rates[step] for step in shown}


def _saves(recipe: Recipe, per_epoch: int) -> list[int]:
    steps = total_steps(recipe.train.epochs, per_epoch)
    every = recipe.checkpoint.every_steps
    found = set(range(0, steps + 1, per_epoch * recipe.checkpoint.every_epochs)) | {steps}
    found |= set(range(0, steps + 1, every)) if every else set()
    return sorted(found - {0})


def _files(recipe: Recipe, weights: list[Weight], processes: int) -> dict[str, Entries]:
    """Return what a checkpoint's files hold."""
    network = [(w.name, "I64" if w.bytes == 8 and not w.shape else "F32", w.shape) for w in weights]
    copies = 2 if recipe.train.ema else 1
    statistics = copies * sum(weight.count for weight in weights if weight.statistics)
    own = ("statistics", "F32", (processes, statistics) if statistics else (1, 0))
    files: dict[str, Entries] = {
        "model": network,
        "optim": list(_optimizer(recipe, weights)),
        "processes": [own, ("tallies", "F64", (processes, TALLY))],
    }
    return files | ({"ema": network} if recipe.train.ema else {})


def _optimizer(recipe: Recipe, weights: list[Weight]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield what the optimizer keeps, under the names of its state_dict."""
    config = recipe.optim
    parameters = [w for w in weights if w.name.endswith(("weight", "bias"))]
    if config.name == "muon":  # in its groups' order: filters, biases, head
        trained = [weight for weight in parameters if weight.trained]
        kinds = (lambda n: n == 4, lambda n: n not in (2, 4), lambda n: n == 2)
        parameters = [w for chosen in kinds for w in trained if chosen(len(w.shape))]
    names = MOMENTS[config.name] if config.name != "sgd" or config.momentum else ()
    for index, weight in enumerate(parameters):
        if weight.trained:
            yield from ((f"{index}.{name}", "F32", weight.shape) for name in names)
            if config.name == "adamw":
                yield f"{index}.step", "F32", ()


def _buckets(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the bytes of DDP's buckets: filled from the last layer on, the first one small."""
    filled, limit = 0, FIRST_BUCKET
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            yield filled
            filled, limit = 0, BUCKET
    if filled:
        yield filled


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fit constant and slope of what takes so long by its size; short counts as much as long."""
    values = np.array(list(seconds.values()))
    slope, constant = np.polyfit(list(seconds), values, 1, w=1 / values)
    return float(constant), float(slope)
