"""Convert weights to safetensors: `cifar-dist convert IN.pt OUT.safetensors`.

Only tensors and plain values are unpickled (`weights_only`): a file with other objects is refused,
and no code in it runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from cifar_dist.command import Parser, command
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.files import replace_file

if TYPE_CHECKING:
    from cifar_dist.storage.checkpoint import Tensors

PREFIXES = ("module.", "_orig_mod.")  # added to every name by DDP and torch.compile


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, convert, print, and return the exit code."""
    parser = Parser("convert", __doc__)
    parser.add_argument("source", type=Path, metavar="IN.pt", help="file of torch.save")
    parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="file to write")
    parser.add_argument("--key", help="entry of IN.pt that holds the state_dict")
    parser.add_argument(
        "--to",
        metavar="NETWORK",
        help="network whose names the tensors get, as of model.name; matched by name without a "
        "prefix, or else by shape in their order",
    )
    options = parser.read(argv)
    tensors = convert(options.source, options.target, options.key, options.to)
    count = sum(tensor.numel() for tensor in tensors.values())
    print(f"{options.target}: {len(tensors)} tensors, {count} parameters and buffers")
    return 0


def convert(source: Path, target: Path, key: str | None = None, to: str | None = None) -> Tensors:
    """Write the tensors in `source` to `target` atomically, and return them.

    Args:
        source: a file of torch.save.
        target: a new file.
        key: the entry of `source` that holds the state_dict; None if `source` is a state_dict.
        to: the network whose names the tensors get; None keeps their names. The matches are
            printed.

    Raises:
        UsageError: `source` has no such state_dict, its tensors do not match the network, or it
            contains objects whose unpickling could run code; or `target` exists or cannot be
            written.
    """
    from safetensors.torch import save

    require(
        target.suffix == ".safetensors",
        f"'{target}' does not end in .safetensors; choose a name that does",
    )
    require(not os.path.lexists(target), f"'{target}' exists; remove it or choose another name")
    tensors = _make_plain(_choose(_read(source), key, source), source)
    if to is not None:
        tensors = _rename(tensors, to, source)
    try:
        replace_file(target, save(tensors))
    except KeyError as error:
        raise UsageError(
            f"'{source}' has tensors of type {error}, which safetensors does not support; convert "
            "them to another type"
        ) from error
    except OSError as error:
        raise UsageError(f"'{target}' cannot be written ({error}); choose another place") from error
    return tensors


def _read(source: Path) -> Any:
    import pickle
    import warnings

    import torch

    require(source.is_file(), f"'{source}' is not a file; name one that torch.save wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats are harmless
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message is long, and suggests unsafe loading
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UsageError(
            f"'{source}' contains objects other than tensors"
            + (f" ({found.group(1)[:80]!a})" if found else "")
            + " and is refused, because unpickling them could run code; in the program that wrote "
            "it, save only the network's state_dict()"
        ) from error
    except Exception as error:  # a damaged or malicious file may raise any exception
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UsageError(
            f"'{source}' cannot be read as a file of torch.save ({reason}); get a new copy"
        ) from error


def _choose(content: Any, key: str | None, source: Path) -> Tensors:
    """Return the state_dict in `content`.

    Raises:
        UsageError: there is none; the message lists the entries.
    """
    from cifar_dist.storage.weights import name_some

    entries = content if isinstance(content, dict) else {}
    chosen = content if key is None else entries.get(key)
    if _is_tensors(chosen):
        return dict(chosen)
    require(not _is_tensors(content), f"'{source}' is itself a state_dict; remove --key {key}")
    kinds = [f"{name} ({type(value).__name__})" for name, value in entries.items()]
    fitting = [str(name) for name, value in entries.items() if _is_tensors(value)]
    where = "" if key is None else f" under --key {key}"
    raise UsageError(
        f"'{source}' has no state_dict{where}, but "
        + (f"the entries {name_some(kinds)}" if kinds else f"a {type(content).__name__}")
        + (
            f"; give --key with one of: {name_some(fitting)}"
            if fitting
            else "; in the program that wrote it, save only the network's state_dict()"
        )
    )


def _is_tensors(value: Any) -> TypeGuard[Tensors]:
    import torch

    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())
    )


def _make_plain(tensors: Tensors, source: Path) -> Tensors:
    """Return dense copies that share no memory, and remove a prefix that all names have."""
    import torch

    from cifar_dist.storage.weights import name_some

    size = source.stat().st_size
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.numel() * tensor.element_size() > size  # expanded from a few stored values
    ]
    require(
        not odd,
        f"'{source}' does not store every value of {name_some(odd)}; save dense tensors on the CPU",
    )
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), "")
    return {
        name.removeprefix(prefix): tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _rename(tensors: Tensors, to: str, source: Path) -> Tensors:
    """Give tensors the names of a network, by name or by the order of their shapes."""
    import torch

    from cifar_dist.config import ModelConfig
    from cifar_dist.models.catalogue import build_network

    classes = len(list(tensors.values())[-1]) if list(tensors.values())[-1].ndim else 1
    with torch.device("meta"):
        wanted = build_network(ModelConfig(name=to), classes).state_dict()
    columns = zip(*(name.split(".")[:-1] for name in tensors), strict=False)
    prefix = ".".join(words[0] for words in takewhile(lambda words: len({*words}) == 1, columns))
    plain = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}
    if plain.keys() == wanted.keys():
        pairs = {name: (f"{prefix}.{name}" if prefix else name) for name in wanted}
    else:
        require(
            len(tensors) == len(wanted),
            f"'{source}' has {len(tensors)} tensors, and {to} has {len(wanted)}; name the network "
            "that the weights are of",
        )
        pairs = dict(zip(wanted, tensors, strict=True))
    for name, old in pairs.items():
        found, needed = list(tensors[old].shape), list(wanted[name].shape)
        require(
            found == needed,
            f"'{source}': {old} has the shape {found}, but {name} of {to}, in its place, has "
            f"{needed}; name the network that the weights are of",
        )
        print(f"{old} -> {name} {needed}")
    return {name: tensors[old] for name, old in pairs.items()}


if __name__ == "__main__":
    sys.exit(main())
