"""Predict what a run will do from its recipe alone; tests compare it with what runs record."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cifar_dist.config import ModelConfig, OptimConfig, Recipe, local_path
from cifar_dist.data import Dataset
from cifar_dist.data.counts import count_images
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.storage.checkpoint import AVERAGE, MODEL, OPTIM, PROCESSES
from cifar_dist.training.schedule import learning_rate, total_steps

if TYPE_CHECKING:  # torch takes two seconds to import
    import torch
    from torch import nn

    from cifar_dist.models.costs import Costs

FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes; DDP's gradient buckets
TALLY = 3  # float64 sums of metrics.Tally, per process
FLAG = 4  # bytes of the all-reduce by which processes agree on stopping at each step


@dataclass(frozen=True)
class Prediction:
    """Prediction of a run.

    Attributes:
        processes: world size.
        dataset: with the labels and classes of the real one, and no pixels.
        steps_per_epoch, steps: optimizer steps.
        left_over: training images of the last incomplete batch of an epoch, which is dropped.
        rates: learning rate at the first, highest, middle and last step, counted from 1.
        saves: steps after which a checkpoint is written, besides those of the best epochs.
        checkpoint: bytes of the tensors in each safetensors file.
        disk: largest size of all checkpoints together, in bytes.
        parameters: number of trainable ones.
        multiplications: multiply-adds of the forward pass of one image.
        memory: estimated bytes on each device, by use.
        sent: bytes that each process contributes to collectives in a step.
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
    """Predict a run of `recipe`.

    Raises:
        UsageError: the dataset cannot be counted or is smaller than a batch, or the network cannot
            be trained on it.
    """
    train, dataset = recipe.train, count_images(recipe.data)
    images, side = len(dataset.train), dataset.train.image_size
    dataset.require_batch(train.batch_size, recipe.optim)
    per_epoch = images // train.batch_size
    costs = measure_network(recipe.model, len(dataset.classes), side)
    part = train.batch_size // train.accumulate // processes
    if part == 1 and not train.sync_batchnorm:
        from cifar_dist.models.catalogue import build_network
        from cifar_dist.training.trial import require_batchnorm_values

        require_batchnorm_values(build_network(recipe.model, len(dataset.classes)), part, side)
    trained = [p for p in costs.network.parameters() if p.requires_grad]
    checkpoint = _files(recipe, costs.network, processes)
    at_once = recipe.checkpoint.keep + 1 + ("val" in dataset.evaluation)
    sizes = [p.nbytes // (2 if train.compress_gradients else 1) for p in trained]
    # Most activations are kept in the precision of the arithmetic.
    narrow = 2 if train.precision in ("bf16", "fp16") else 1
    return Prediction(
        processes=processes,
        dataset=dataset,
        steps_per_epoch=per_epoch,
        steps=total_steps(train.epochs, per_epoch),
        left_over=images - per_epoch * train.batch_size,
        rates=_rates(recipe, per_epoch),
        saves=_saves(recipe, per_epoch),
        checkpoint=checkpoint,
        disk=at_once * sum(checkpoint.values()),
        parameters=sum(p.numel() for p in trained),
        multiplications=costs.multiplications,
        memory={
            "weights": checkpoint[MODEL] * (2 if train.ema else 1),
            "gradients": _bytes(trained),
            "optimizer": checkpoint[OPTIM],
            "activations": part * costs.activations // narrow,
            "images": images * 3 * side**2,
        },
        sent=sum(sizes) + FLAG if processes > 1 else 0,
        collectives=len(list(_buckets(sizes))) + 1 if processes > 1 else 0,
    )


def measure_network(config: ModelConfig, classes: int, image_size: int) -> Costs:
    """Measure the network of a recipe.

    Raises:
        UsageError: it cannot process images of this size, or returns another number of logits.
    """
    gc.disable()  # garbage collection during these imports and at exit takes a second
    try:
        from cifar_dist.models.catalogue import build_network
        from cifar_dist.models.costs import measure

        costs = measure(config.name, lambda: build_network(config, classes), image_size)
    finally:
        gc.freeze()
        gc.enable()
    require(
        costs.outputs == classes,
        f"{config.name} returns {costs.outputs} logits per image, and the dataset has {classes} "
        "classes",
    )
    return costs


def step_seconds(
    computation: float, collectives: float, sent: float, processes: int, link: tuple[float, float]
) -> float:
    """Return the seconds of a step with ring all-reduces that do not overlap with computation.

    Args:
        computation: seconds of one process's part of the batch.
        collectives, sent: all-reduces in a step, and their bytes.
        link: latency between two processes in seconds, and bandwidth in bytes per second.
    """
    latency, bandwidth = link
    waiting = collectives * (processes - 1) * latency
    return computation + waiting + 2 * (processes - 1) / processes * sent / bandwidth


def read_link(path: str) -> tuple[float, float]:
    """Return latency in seconds and bandwidth in bytes per second from output of `doctor --json`.

    Raises:
        UsageError: the file is not the output of a live doctor on several processes.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["all_reduce"]
        return float(found["latency_seconds"]), float(found["bytes_per_second"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{path}' is no output of a live `doctor --json` on several processes ({error!r})"
        ) from error


def read_rate(path: str) -> float:
    """Return the median of the recorded images per second per process of a run.

    Raises:
        UsageError: the folder is not a run folder, or no speeds are recorded.
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
        reason = f" ({one_line(error, None) or type(error).__name__})"
    require(
        0 < rate < math.inf,
        f"'{path}' is not a run folder with recorded speeds{reason}; name one whose "
        "track.every_steps is not 0",
    )
    return rate


def _rates(recipe: Recipe, per_epoch: int) -> dict[int, float]:
    """Return the learning rate at the first, highest, middle and last step."""
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


def _files(recipe: Recipe, network: nn.Module, processes: int) -> dict[str, int]:
    """Return the bytes of the tensors in each file of a checkpoint."""
    model = _bytes(network.state_dict().values())
    statistics = _bytes(buffer for buffer in network.buffers() if buffer.is_floating_point())
    copies = 2 if recipe.train.ema else 1
    files = {
        MODEL: model,
        OPTIM: _optimizer_bytes(network, recipe.optim),
        PROCESSES: processes * (copies * statistics + 8 * TALLY),
    }
    if recipe.train.ema:
        files[AVERAGE] = model
    return files


def _optimizer_bytes(network: nn.Module, config: OptimConfig) -> int:
    """Return the bytes that the optimizer keeps, from a step on the meta device."""
    import torch

    from cifar_dist.training.optim import build_optimizer

    optimizer = build_optimizer(network, config)
    for group in optimizer.param_groups:
        group["fused"] = False  # fused kernels need a real device
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    return _bytes(value for value in state if isinstance(value, torch.Tensor))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _buckets(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the bytes of DDP's gradient buckets, which are filled from the last layer backwards."""
    filled, limit = 0, FIRST_BUCKET
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            yield filled
            filled, limit = 0, BUCKET
    if filled:
        yield filled


def fit_line(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Fit seconds = constant + slope * size, by relative error."""
    values = np.array(list(seconds.values()))
    slope, constant = np.polyfit(list(seconds), values, 1, w=1 / values)
    return float(constant), float(slope)
