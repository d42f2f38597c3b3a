"""Train a recipe: `accelerate launch -m cifar_dist.train [--config RECIPE] [--section.key N]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cifar_dist.command import run_verb
from cifar_dist.config import Recipe, dump_recipe, make_recipe, parse_recipe
from cifar_dist.launching.options import split_options
from cifar_dist.processes.ending import note_preempted, print_ending
from cifar_dist.processes.preemption import EXIT_CODE, Preemption
from cifar_dist.processes.start import leave_processes

if TYPE_CHECKING:
    from cifar_dist.training.run import Result as Result


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and return the exit code."""
    preemption = Preemption()

    def verb(arguments: Sequence[str]) -> int:
        if {"-h", "--help"} & set(arguments):
            print(_help(arguments))
            return 0
        launched, arguments = split_options(arguments)
        print_config = "--print_config" in arguments
        arguments = [word for word in arguments if word != "--print_config"]
        recipe, origin = parse_recipe(arguments)
        if print_config:
            print(dump_recipe(recipe), end="")
            return 0
        if launched.processes:
            from cifar_dist.launching.processes import launch

            with preemption.interruptible():  # until the launcher handles signals
                return launch(launched, recipe, arguments)
        from torch.distributed.elastic.multiprocessing.errors import record

        from cifar_dist.training.run import run_until_end

        recorded = record(run_until_end)  # names a crash in the launcher's lines
        result = recorded(recipe, origin, preemption, print_ending)
        leave_processes()
        if result and result.state == "preempted":
            note_preempted()
            return EXIT_CODE
        return 0

    with preemption.listen():
        return run_verb(verb, argv)


def _help(argv: Sequence[str]) -> str:
    from cifar_dist.help import train_help

    place = next(n for n, word in enumerate(argv) if word in ("-h", "--help"))
    in_full = list(argv[place + 1 : place + 2]) == ["all"]
    rest = [*argv[:place], *argv[place + 1 + in_full :]]
    return train_help(*parse_recipe(split_options(rest)[1]), in_full)


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
