"""Train a recipe: `accelerate launch -m cifar_dist.train [--config RECIPE] [--section.key N]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cifar_dist.command import run_verb
from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.processes.ending import print_ending
from cifar_dist.processes.preemption import EXIT_CODE, Preemption
from cifar_dist.processes.start import leave_processes

if TYPE_CHECKING:
    from cifar_dist.training.run import Result as Result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    preemption = Preemption()

    def verb(arguments: Sequence[str]) -> int:
        recipe, origin = parse_recipe(arguments)
        from torch.distributed.elastic.multiprocessing.errors import record

        from cifar_dist.training.run import run_until_end

        recorded = record(run_until_end)  # names a crash in the launcher's lines
        result = recorded(recipe, origin, preemption, print_ending)
        leave_processes()
        return EXIT_CODE if result and result.state == "preempted" else 0

    with preemption.listen():
        return run_verb(verb, argv)


def run(recipe: Recipe, origin: str = "Python") -> Result:
    """Train `recipe`; see `cifar_dist.training.run.run`."""
    from cifar_dist.training.run import run

    return run(recipe, origin)


if __name__ == "__main__":
    sys.exit(main())
