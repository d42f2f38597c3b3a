"""Command line options of train, plan, doctor and parity besides those of the recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cifar_dist.command import Parser
from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.errors import require
from cifar_dist.processes.environment import is_launched

PORT = 29500  # of the first machine, by torch's convention


class Options(Parser):
    """Parser for the options of one verb and those of train.

    Args:
        verb: the name, such as "plan".
        description: the text for `--help`.
    """

    def __init__(self, verb: str, description: str | None) -> None:
        more = "All other options, such as RECIPE and --section.key VALUE, are those of train."
        super().__init__(verb, description, more)

    def read_recipe(self, argv: Sequence[str]) -> tuple[Any, list[str], Recipe, str]:
        """Return the verb's options, the recipe's options, the recipe, and its origin.

        Raises:
            UsageError: an option is unknown or invalid.
        """
        options, recipe_options = self.parse_known_args(argv)
        recipe, origin = parse_recipe(recipe_options)
        return options, recipe_options, recipe, origin


@dataclass(frozen=True)
class Launch:
    """The processes to start.

    Attributes:
        processes: on this machine; 0 trains in this process.
        machines: number of machines, each of which starts the same command with its own `rank`.
        rank: of this machine.
        address: host and port of the first machine, such as 10.0.0.1:29500.
    """

    processes: int = 0
    machines: int = 1
    rank: int = 0
    address: str = ""


def split_options(argv: Sequence[str]) -> tuple[Launch, list[str]]:
    """Take --processes, --machines, --machine-rank and --address out of a command line.

    Raises:
        UsageError: a value is invalid, or an option lacks another one.
    """
    parser = Parser("train", None)
    parser.add_argument("--processes")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int)
    parser.add_argument("--address", default="")
    options, rest = parser.parse_known_args(list(argv))
    named = [name for name in ("machine_rank", "address") if getattr(options, name)]
    require(options.machines >= 1, f"--machines is {options.machines}; give 1 or more")
    if options.machines > 1:
        require(
            options.address.rpartition(":")[2].isdecimal() and ":" in options.address[1:],
            f"--machines needs --address HOST:PORT of the first machine, such as 10.0.0.1:{PORT}",
        )
        require(options.machine_rank is not None, "--machines needs --machine-rank, 0 on the first")
        require(
            0 <= options.machine_rank < options.machines,
            f"--machine-rank is {options.machine_rank}; give 0 to {options.machines - 1}",
        )
    else:
        require(not named, f"--{'-'.join(named[:1])} needs --machines".replace("_", "-"))
    if options.processes is None and options.machines == 1:
        return Launch(), rest
    require(
        not is_launched(),
        "--processes starts the processes, but a launcher has already started this one; remove "
        "--processes, or start without the launcher",
    )
    processes = _count(options.processes or "auto")
    if processes * options.machines == 1:
        return Launch(), rest
    return Launch(processes, options.machines, options.machine_rank or 0, options.address), rest


def _count(asked: str) -> int:
    """Return the number of processes; auto means one per GPU, or one without GPUs."""
    if asked == "auto":
        from cifar_dist.launching.facts import find_devices

        return len(find_devices()) or 1
    require(
        asked.isdecimal() and int(asked) > 0,
        f"--processes is '{asked}'; give a number of processes, or auto for one per GPU",
    )
    return int(asked)
