"""Measure the cost of the NaN guard and of saving.

`python -m benchmarks.guards [--models NAME...] [--rounds N]`

Trains the same network on the same images with and without the guard against non-finite values, a
few steps of each alternately. Then a real run saves often, and the time for which saving blocks
training is measured. Ratios are medians over rounds. If rounds vary by more than the guard costs,
the guard's operations timed alone are the better measure.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional

from cifar_dist.config import AugmentConfig, ModelConfig, OptimConfig, TrainConfig, parse_recipe
from cifar_dist.data.augment import Pixels
from cifar_dist.data.batches import build_loader
from cifar_dist.data.synthetic import draw
from cifar_dist.models.catalogue import build_network
from cifar_dist.processes.start import start_processes
from cifar_dist.train import run
from cifar_dist.training import session
from cifar_dist.training.engine import TrainState, seed_step, train_epoch
from cifar_dist.training.guard import Guard, gradient_norm, scale_showing, weight_sums
from cifar_dist.training.losses import Loss
from cifar_dist.training.metrics import Tally
from cifar_dist.training.optim import build_optimizer

BATCH = 64
PIXELS = Pixels((0.5,) * 3, (0.25,) * 3, AugmentConfig(flip="random", translate=2), 0)
SGD = OptimConfig(lr=1e-4, momentum=0.9)


def build_state(accelerator: Accelerator, model: str) -> TrainState:
    """Return a new network with its optimizer and a guard."""
    torch.manual_seed(0)
    network = build_network(ModelConfig(name=model), 10)
    network = network.to(accelerator.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(network, SGD)
    guard = Guard(optimizer, accelerator.device)
    prepared, optimizer = accelerator.prepare(network, optimizer)
    tally = Tally(accelerator.device)
    return TrainState(network, prepared, optimizer, None, guard, tally, 0, torch.zeros(()))


def bare_epoch(
    accelerator: Accelerator, state: TrainState, loader: Any, config: TrainConfig
) -> Iterator[None]:
    """Train an epoch as train_epoch does, without the guard."""
    scale = accelerator.num_processes / config.batch_size
    state.model.train()
    for batch in loader:
        state.optimizer.zero_grad()
        seed_step(accelerator, config, state.step, 0)
        logits = state.model(PIXELS.for_training(batch, 0))
        loss_sum = functional.cross_entropy(logits, batch.labels, reduction="sum")
        accelerator.backward(loss_sum * scale)
        state.tally.add(loss_sum, logits, batch.labels)
        for group in state.optimizer.param_groups:
            group["lr"] = SGD.lr
        state.optimizer.step()
        state.step += 1
        yield


def measure_guard(accelerator: Accelerator, model: str, rounds: int, steps: int) -> dict[str, Any]:
    """Return the ratios of guarded to bare step time, wall and CPU, and the cost of a digest."""
    config = TrainConfig(batch_size=BATCH)
    images = draw(BATCH * steps, 32, seed=(0,))
    loader, _ = build_loader(accelerator, images, BATCH, seed=0)
    states = {name: build_state(accelerator, model) for name in ("guarded", "bare")}
    epochs: dict[str, Callable[[], Iterator[None]]] = {
        "guarded": lambda: train_epoch(
            accelerator, states["guarded"], loader, PIXELS, config, Loss(0), lambda _: SGD.lr, 0
        ),
        "bare": lambda: bare_epoch(accelerator, states["bare"], loader, config),
    }
    wall: list[float] = []
    processor: list[float] = []
    step_seconds: list[float] = []
    alone: list[float] = []
    for number in range(rounds + 1):
        taken = {}
        for name in ("guarded", "bare") if number % 2 else ("bare", "guarded"):
            began, used = time.perf_counter(), time.process_time()
            for _ in epochs[name]():
                pass
            taken[name] = (time.perf_counter() - began, time.process_time() - used)
        if number:  # the first round warms up
            wall.append(taken["guarded"][0] / taken["bare"][0])
            processor.append(taken["guarded"][1] / taken["bare"][1])
            step_seconds.append(taken["bare"][0] / steps)
            alone.append(time_guard(states["guarded"]) / step_seconds[-1])
    digests = []
    for _ in range(20):
        began = time.perf_counter()
        weight_sums(states["bare"].network)
        digests.append(time.perf_counter() - began)
    step = statistics.median(step_seconds)
    return {
        "model": model,
        "wall": statistics.median(wall),
        "cpu": statistics.median(processor),
        "quartiles": statistics.quantiles(wall, n=4),
        "alone": statistics.median(alone),
        "step_ms": step * 1e3,
        "digest_steps": statistics.median(digests) / step,
    }


def time_guard(state: TrainState) -> float:
    """Return the seconds that the guard's operations take on the current gradients."""
    assert state.guard is not None
    one, parameters = torch.ones(()), list(state.network.parameters())
    began = time.perf_counter()
    scale_showing(one, one)
    state.guard.admits(gradient_norm(parameters))
    return time.perf_counter() - began


def measure_saving(model: str, steps: int) -> dict[str, Any]:
    """Return the time for which a save blocks training, in steps, and the seconds of a commit."""
    original, stalls, ends = session.save, [], []

    def save(current: session.Session) -> None:
        began = time.perf_counter()
        original(current)
        stalls.append(time.perf_counter() - began)

    original_start = session.Saver.start

    def start(self: session.Saver, step: int, commit: Callable[[], object]) -> None:
        def timed() -> None:
            began = time.perf_counter()
            commit()
            ends.append(time.perf_counter() - began)

        original_start(self, step, timed)

    session.save, session.Saver.start = save, start  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe, _ = parse_recipe(
                [
                    *("--config", "smoke", "--model.name", model, "--optim.name", "sgd"),
                    *("--optim.lr", "0.001", "--optim.momentum", "0.9", "--train.ema", "0.99"),
                    *("--data.limit_train", str(BATCH * steps), "--data.limit_test", "64"),
                    *("--train.batch_size", str(BATCH), "--train.epochs", "2"),
                    *("--checkpoint.every_steps", str(steps // 2), "--out", f"{folder}/run"),
                    *("--track.log_with", "[]", "--track.every_steps", str(steps // 2)),
                ]
            )
            out = run(recipe).out
            lines = (out / "metrics.jsonl").read_text().splitlines()
            speeds = [json.loads(line).get("images_per_second") for line in lines]
            size = sum(f.stat().st_size for f in max((out / "checkpoints").iterdir()).iterdir())
    finally:
        session.save, session.Saver.start = original, original_start  # type: ignore[method-assign]
    step = BATCH / statistics.median(speed for speed in speeds if speed)
    return {
        "stall_steps": statistics.median(stalls) / step,
        "commit_seconds": statistics.median(ends),
        "megabytes": size / 1e6,
    }


def main() -> None:
    """Measure, print a table, and write it with the machine and the versions."""
    parser = argparse.ArgumentParser("benchmarks.guards")
    parser.add_argument("--models", nargs="+", default=["tutorial", "resnet18"])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    accelerator, _ = start_processes(TrainConfig())
    lines = [
        f"`python -m benchmarks.guards --rounds {options.rounds}`, {date.today()}, torch "
        f"{torch.__version__}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, batch {BATCH}",
        "",
        "| network | guarded / bare, wall | CPU | quartiles of wall | guard alone "
        "| digest of all weights | training blocked by a save | checkpoint | written in |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in options.models:
        large = not model.startswith("tutorial")
        found = measure_guard(accelerator, model, options.rounds, steps=2 if large else 10)
        found |= measure_saving(model, steps=4 if large else 20)
        low, _, high = found["quartiles"]
        lines.append(
            f"| {model} | {found['wall']:.3f} | {found['cpu']:.3f} | {low:.3f} to {high:.3f} | "
            f"{found['alone']:.2%} of a step | "
            f"{found['digest_steps']:.3f} steps | {found['stall_steps']:.2f} steps | "
            f"{found['megabytes']:.1f} MB | {found['commit_seconds']:.2f} s |"
        )
    text = "\n".join(lines)
    print(text)
    (Path(__file__).parent / "results" / "guards.md").write_text(
        f"# The cost of the guard and of saving\n{text}\n"
    )


if __name__ == "__main__":
    main()
