"""Train a recipe: `accelerate launch -m cifar_dist.train [--config RECIPE] [--section.key N]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cifar_dist.command import run_verb
from cifar_dist.config import Recipe, make_recipe, parse_recipe
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


def train(recipe: str | Path | Recipe = "cifar10", model: Any = None, **options: Any) -> Result:
    """Train a network from Python; also in a script that accelerate launch or torchrun starts.

    Args:
        recipe: a shipped name, a file or a Recipe.
        model: class or function of the network, in place of `model.name`. It is called with
            `model.options` by keyword, and with `num_classes` if it takes that.
        options: keys of the recipe, as in `train("cifar10", **{"train.epochs": 3})`.

    Raises:
        UsageError: the request cannot work; nothing was started.
        Preempted: a signal came before training had begun; nothing was lost.
        RunFailed: anything else; status.json holds the same line.
    """
    from cifar_dist.training.run import run

    return run(make_recipe(recipe, options), "Python", model)


def run(recipe: Recipe, origin: str = "Python") -> Result:
    """Train `recipe`; see `cifar_dist.training.run.run`."""
    from cifar_dist.training.run import run

    return run(recipe, origin)


class _Callable(ModuleType):
    """`cifar_dist.train` is this module and, for `from cifar_dist import train`, the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Result:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
