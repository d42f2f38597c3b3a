"""The text of `cifar-dist train --help`: every option with its value in the recipe."""

import dataclasses
import inspect
import re
import textwrap
from typing import Any

import yaml

from cifar_dist.config import Recipe, recipe_names, types_of
from cifar_dist.values import RecipeDumper, words_of

COLUMN, WIDTH = 34, 100
USAGE = """\
usage: cifar-dist train [RECIPE] [--processes N] [--section.key VALUE ...]

Train an image classifier, or resume the run in --out.
"""
COMMANDS = {
    "RECIPE": "a YAML file or a shipped recipe, cifar10 by default; shipped: {recipes}",
    "--processes N": "start N processes on this machine; auto: one per GPU",
    "--machines M": "number of machines; needs --machine-rank R and --address HOST:PORT",
    "--print_config": "print the value of every option, and exit",
    "--help all": "describe every option in full",
    "--version": "print the version",
}


def train_help(recipe: Recipe, origin: str, in_full: bool) -> str:
    """Return the help text.

    Args:
        recipe: its values are shown as the defaults.
        origin: name of the recipe, as of `parse_recipe`.
        in_full: show the whole description of each option, not only its first sentence.
    """
    recipes = ", ".join(recipe_names())
    blocks = [USAGE]
    blocks.append(
        "".join(_entry(name, text.format(recipes=recipes)) for name, text in COMMANDS.items())
    )
    blocks.append(f"Options, with their values in {origin}:\n")
    blocks.append(_section("", recipe, in_full))
    for name, section in vars(recipe).items():
        if dataclasses.is_dataclass(section):
            title = inspect.getdoc(type(section)).splitlines()[0]  # type: ignore[union-attr]
            blocks.append(f"{title}\n{_section(f'{name}.', section, in_full)}")
    return "\n".join(blocks)


def _section(prefix: str, section: Any, in_full: bool) -> str:
    described = _attributes(type(section))
    lines = []
    for name, value in vars(section).items():
        if not dataclasses.is_dataclass(value):
            text = described[name] if in_full else re.split(r"\.(?: |$)", described[name])[0]
            words = words_of(types_of(f"{prefix}{name}"))
            text += f" [{', '.join(words)}]" if words else ""
            lines.append(_entry(f"--{prefix}{name} {_shown(value)}", text))
    return "".join(lines)


def _entry(name: str, text: str) -> str:
    """Return one option and its description, wrapped in the right column."""
    first = f"  {name:{COLUMN - 4}}  "
    wrapped = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)
    if len(first) > COLUMN:
        first = f"{first.rstrip()}\n{' ' * COLUMN}"
    return first + f"\n{' ' * COLUMN}".join(wrapped) + "\n"


def _attributes(kind: type) -> dict[str, str]:
    """Return the descriptions in the "Attributes" part of a docstring, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].splitlines():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


def _shown(value: Any) -> str:
    """Return a value as it is written on the command line."""
    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, width=1000)
    return str(value) if isinstance(value, str) else text.removesuffix("...\n").strip()
