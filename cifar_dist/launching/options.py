"""Options of the launching verbs; whatever they do not know is for the recipe."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from cifar_dist.config import Recipe, parse_recipe
from cifar_dist.errors import UsageError


class Options(argparse.ArgumentParser):
    """Options of one verb, beside those of train.

    Args:
        verb: its name.
        description: what it does.
    """

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            f"cifar-dist {verb}",
            description=description,
            epilog="All else, such as --config RECIPE and --section.key VALUE, is as of train.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse in one line, as every verb does."""
        raise UsageError(message)

    def read(self, argv: Sequence[str]) -> tuple[Any, list[str], Recipe, str]:
        """Return the verb's own options, those of the recipe, the recipe, and its origin.

        Raises:
            UsageError: an option is unknown or has no sense.
        """
        options, own = self.parse_known_args(argv)
        recipe, origin = parse_recipe(own)
        return options, own, recipe, origin
