"""Command line options of plan, doctor and parity; all others are options of the recipe."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.errors import UsageError


class Options(argparse.ArgumentParser):
    """Parser for the options of one verb and those of train.

    Args:
        verb: the name, such as "plan".
        description: the text for `--help`.
    """

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            f"cifar-dist {verb}",
            description=description,
            epilog="All other options, such as --config RECIPE and --section.key VALUE, are those "
            "of train.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise UsageError, so that the error is one line, as for every verb."""
        raise UsageError(message)

    def read(self, argv: Sequence[str]) -> tuple[Any, list[str], Recipe, str]:
        """Return the verb's options, the recipe's options, the recipe, and its origin.

        Raises:
            UsageError: an option is unknown or invalid.
        """
        options, recipe_options = self.parse_known_args(argv)
        recipe, origin = parse_recipe(recipe_options)
        return options, recipe_options, recipe, origin
