"""Compare Muon's orthogonalisation on Gram matrices with the same iteration on the filters.

`python -m benchmarks.muon [--rounds N]`
"""

import argparse
import time
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, Rounds, median, paired, record, spread, table
from cifar_dist.processes.start import keep_memory
from cifar_dist.training.optim import orthogonalise

BANKS = (3, 256, 2304)  # the widest filter banks of speednet
TURN_SECONDS = 0.2  # at least, so that most calls find their data in the caches
FILTERS, GRAM = "on the filters", "on Gram matrices"


def on_filters(filters: torch.Tensor) -> torch.Tensor:
    """Orthogonalise [B, R, C] by three Newton-Schulz iterations as Jordan (2024) defines them."""
    work = filters / filters.norm(dim=(1, 2), keepdim=True)
    for _ in range(3):
        gram = work @ work.mT
        work = 3.4445 * work + (-4.7750 * gram + 2.0315 * gram @ gram) @ work
    return work


def measure(rounds: int) -> Rounds:
    """Time both after a warm-up round, and alternate the order in each round."""
    filters = torch.randn(BANKS)
    subjects = {
        FILTERS: lambda: on_filters(filters),
        GRAM: lambda: orthogonalise(list(filters)),
    }
    found: Rounds = {name: [] for name in subjects}
    calls = 1
    for number in range(rounds + 1):
        for name in subjects if number % 2 else reversed(subjects):
            began, used = time.perf_counter(), time.process_time()
            for _ in range(calls):
                subjects[name]()
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            if number:
                found[name].append({"wall": wall / calls, "cpu": cpu / calls})
        calls = max(calls, round(TURN_SECONDS / wall))
    return found


def main() -> None:
    """Measure, and write results/muon."""
    parser = argparse.ArgumentParser("benchmarks.muon", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    keep_memory()
    torch.manual_seed(0)
    rounds = measure(options.rounds)
    rows = [
        [
            name,
            f"{1e3 * median(rounds, name, 'wall'):.1f}",
            # In this order, the ratio is the time relative to the iteration on the filters.
            *(spread(paired(rounds, FILTERS, name, key)) for key in ("wall", "cpu")),
        ]
        for name in (FILTERS, GRAM)
    ]
    record(
        options.results,
        "muon",
        "Orthogonalise {} filter banks of {} x {}, {} rounds".format(*BANKS, options.rounds),
        table(["iteration", "ms", "of the time", "of the CPU seconds"], rows),
        rounds,
    )


if __name__ == "__main__":
    main()
