"""Typed values of options, from YAML and from the command line.

Types are tuples, as of a union: int, float, bool, str, NoneType, Literal, list[...] and
dict[str, Any].
"""

import re
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml

from cifar_dist.errors import UsageError, nearest, require

Types = tuple[Any, ...]


class RecipeLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys and reads numbers as decimal.

    PyYAML's own loader keeps the last of several equal keys. It reads numbers by YAML 1.1: 010 as
    8, 1:30 as 90, and 1e-3 as text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as PyYAML declares it

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and refuse duplicate keys."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str):
                require(
                    key.value not in lines,
                    f"{key.value} is given twice in {self.name}, "
                    f"lines {lines.get(key.value)} and {line}",
                )
                lines[key.value] = line
        return node


class RecipeDumper(yaml.SafeDumper):
    """YAML dumper that quotes every string that RecipeLoader would not read as a string."""


CORE = "tag:yaml.org,2002:"
FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
WORDS = "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
SCALARS = {  # in the order in which they are tried, with their possible first characters
    "null": (re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "bool": (re.compile(f"(?:{WORDS})$"), list("yYnNtTfFoO")),
    "int": (re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")),
    "float": (FLOAT, list("-+.0123456789")),
}
for _name, _scalar in SCALARS.items():
    RecipeLoader.add_implicit_resolver(f"{CORE}{_name}", *_scalar)
RecipeDumper.add_implicit_resolver(f"{CORE}float", *SCALARS["float"])


def dump(values: Any) -> str:
    """Return plain values as YAML that RecipeLoader reads back."""
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False)


def parse_text(text: str, types: Types, key: str) -> Any:
    """Return the value of a text, as on the command line, where quotes are not needed.

    Raises:
        UsageError: the text has another type.
    """
    text = text.strip()
    words = words_of(types)
    if text in words:
        return text
    try:
        value = yaml.load(text, Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text  # such as a Windows path
    if value is None and NoneType in types:
        return None
    if str in types:
        return text
    if Any in types:
        return value
    if isinstance(value, str) or value is None:
        raise UsageError(f"{key}: {_wrong(text, types)}")
    return check_value(value, types, key, text)


def check_value(value: Any, types: Types, key: str, text: str | None = None) -> Any:
    """Return a Python value as one of the types; an integer may stand for a float.

    Args:
        text: how the value was written, for the message.

    Raises:
        UsageError: the value has another type.
    """
    text = str(value) if text is None else text
    words = words_of(types)
    if isinstance(value, str) and not (words or str in types):
        return parse_text(value, types, key)
    kinds = [get_origin(kind) or kind for kind in types if get_origin(kind) is not Literal]
    if float in kinds and int not in kinds and type(value) is int:
        return float(value)
    if not (value in words if words and isinstance(value, str) else type(value) in kinds):
        raise UsageError(f"{key}: {_wrong(text, types)}")
    if isinstance(value, list):
        items = next(get_args(kind) for kind in types if get_origin(kind) is list)
        return [check_value(item, items, key) for item in value]
    return value


def parse_node(loader: RecipeLoader, node: Any, types: Types, key: str, place: str) -> Any:
    """Return the value of a YAML node.

    Args:
        place: file and line of the node, for messages.

    Raises:
        UsageError: the value has another type, or is a word that YAML reads as another type.
    """
    items = next((get_args(kind) for kind in types if get_origin(kind) is list), None)
    if items and isinstance(node, yaml.SequenceNode):
        return [parse_node(loader, item, items, key, place) for item in node.value]
    require(isinstance(node, yaml.ScalarNode), f"{key} is not a single value in {place}")
    text, plain = node.value, node.style is None
    require(
        node.tag in (f"{CORE}str", loader.resolve(yaml.ScalarNode, text, (plain, not plain))),
        f"{key} has the tag {node.tag} in {place}; remove the tag",
    )
    value = loader.construct_object(node)
    if value is None:
        require(NoneType in types, f"{key} has no value in {place}; give one, or remove the key")
        return None
    if plain and (text in words_of(types) or (str in types and not words_of(types))):
        require(
            isinstance(value, str),
            f'{key}: write "{text}" in quotes in {place}; without them YAML reads {value}',
        )
    if isinstance(value, str) and (str in types or text in words_of(types)):
        return value
    return parse_text(text, types, f"{key} in {place}")


def words_of(types: Types) -> list[str]:
    """Return the words of a Literal among the types, or an empty list."""
    return [word for kind in types if get_origin(kind) is Literal for word in get_args(kind)]


def describe(types: Types) -> str:
    """Return in words what a value of these types is."""
    names = {
        bool: "true or false",
        int: "a whole number such as 10",
        float: "a number such as 10 or 0.1",
        str: "a text",
        list: "a list such as [] or [tensorboard]",
        dict: "options by name, such as {width: 64}",
    }
    kinds = [get_origin(kind) or kind for kind in types]
    parts = [names[kind] for kind in (bool, int, float, str, list, dict) if kind in kinds]
    if {int, float} <= set(kinds):
        parts.remove(names[int])
    if words_of(types):
        parts.append(f"one of {', '.join(words_of(types))}")
    if NoneType in kinds:
        parts.append("null")
    return " or ".join(parts)


def _wrong(text: str, types: Types) -> str:
    return f"'{text[:80]}' is not {describe(types)}{nearest(text.lower(), words_of(types))}"
