"""Time fast algorithms against their definitions: Winograd convolutions and Gram matrices.

`python -m benchmarks.arithmetic [--rounds N] [--batch N]`

Measures forward and backward passes of wide 3x3 and 5x5 convolutions on a CPU, of networks with
such convolutions, and Muon's orthogonalisation. The two variants run alternately.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.harness import RESULTS, Rounds, median, paired, record, spread, table
from cifar_dist.models import MODELS
from cifar_dist.processes.start import keep_memory
from cifar_dist.speedups.winograd import WinogradConv2d, use_winograd
from cifar_dist.training.optim import orthogonalise

# Channels in and out, side of the images, side of the filters.
LAYERS = [
    (128, 128, 16, 3),
    (256, 256, 8, 3),
    (512, 512, 4, 3),
    (64, 128, 16, 3),
    (64, 64, 32, 3),
    (32, 32, 16, 5),
    (32, 64, 8, 5),
]
NETWORKS = ["resnet18", "vgg16", "deep", "speednet", "tutorial"]
BANKS = (3, 256, 2304)  # the widest filters of speednet
TURN = 0.2  # minimum seconds of a turn, so that each variant runs with its own data in the caches

Pair = dict[str, Callable[[], object]]


def convolution(inputs: int, outputs: int, side: int, size: int, batch: int) -> Pair:
    """Return both variants of a layer's forward and backward pass."""
    images = torch.randn(batch, inputs, side, side)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()

    def passes(kind: type[nn.Conv2d]) -> Callable[[], object]:
        layer = kind(inputs, outputs, size, padding=size // 2, bias=False)
        layer = layer.to(memory_format=torch.channels_last)
        gradient = torch.randn_like(layer(images))
        return lambda: layer(images).backward(gradient)

    return {"defined": passes(nn.Conv2d), "here": passes(WinogradConv2d)}


def network(name: str, batch: int) -> Pair:
    """Return a network's forward and backward pass, with torch's convolutions and with Winograd."""
    images = torch.rand(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))

    def passes(prepare: Callable[[nn.Module], None]) -> Callable[[], object]:
        built = MODELS[name](10).to(memory_format=torch.channels_last)
        prepare(built)
        return lambda: functional.cross_entropy(built(images), labels).backward()

    return {"defined": passes(lambda _: None), "here": passes(use_winograd)}


def orthogonalisation() -> Pair:
    """Return the Newton-Schulz iteration on the filters, and on their Gram matrix."""
    filters = torch.randn(BANKS)

    def defined() -> None:
        work = filters / filters.norm(dim=(1, 2), keepdim=True)
        for _ in range(3):
            square = work @ work.mT
            work = 3.4445 * work + (-4.7750 * square + 2.0315 * square @ square) @ work

    return {"defined": defined, "here": lambda: orthogonalise(list(filters))}


def measure(pair: Pair, rounds: int) -> Rounds:
    """Run both variants in rounds, reversing their order each round, after one warm-up round."""
    found: Rounds = {name: [] for name in pair}
    times = 1
    for number in range(rounds + 1):
        for name in pair if number % 2 else reversed(pair):
            began, used = time.perf_counter(), time.process_time()
            for _ in range(times):
                pair[name]()
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            if number:
                found[name].append({"wall": wall / times, "cpu": cpu / times})
        times = max(times, round(TURN / wall))
    return found


def main() -> None:
    """Measure, and write results/arithmetic-BATCH.md and .json."""
    parser = argparse.ArgumentParser("benchmarks.arithmetic", description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    work: dict[str, Callable[[], Pair]] = {
        f"{size}x{size}, {inputs} to {outputs} channels, {side} x {side}": (
            lambda shape=(inputs, outputs, side, size): convolution(*shape, options.batch)
        )
        for inputs, outputs, side, size in LAYERS
    }
    work |= {name: lambda name=name: network(name, options.batch) for name in NETWORKS}
    work["orthogonalise {} of {} x {}".format(*BANKS)] = orthogonalisation
    found, rows = {}, []
    for name, build in work.items():
        rounds = found[name] = measure(build(), options.rounds)
        # `paired` divides the second by the first: the arguments give the time ratio here/defined.
        of_time, of_cpu = (paired(rounds, "defined", "here", key) for key in ("wall", "cpu"))
        times = [f"{1e3 * median(rounds, kind, 'wall'):.1f}" for kind in ("defined", "here")]
        rows.append([name, *times, spread(of_time), spread(of_cpu)])
        print(rows[-1], flush=True)
    record(
        options.results,
        f"arithmetic-{options.batch}",
        f"Fewer operations, batch {options.batch}, {options.rounds} rounds",
        table(["work", "as defined, ms", "here, ms", "ratio of time", "ratio of CPU time"], rows),
        found,
    )


if __name__ == "__main__":
    main()
