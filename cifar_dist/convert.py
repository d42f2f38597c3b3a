"""Turn weights into safetensors: `python -m cifar_dist.convert IN.pt OUT.safetensors`.

Nothing else in the package reads pickles, and here only tensors and plain values are read: a file
that holds more is refused, and nothing in it runs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from cifar_dist.command import run_verb
from cifar_dist.errors import UsageError, require
from cifar_dist.files import replace_file

if TYPE_CHECKING:
    from cifar_dist.storage.checkpoint import Tensors

PREFIXES = ("module.", "_orig_mod.")  # which DDP and torch.compile put before every name


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, print, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        parser = argparse.ArgumentParser("cifar_dist.convert", allow_abbrev=False)
        parser.add_argument("source", type=Path, metavar="IN.pt", help="file of torch.save")
        parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="file to write")
        parser.add_argument("--key", help="entry of IN.pt that is the dict of tensors")
        options = parser.parse_args(list(arguments))
        tensors = convert(options.source, options.target, options.key)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"{options.target}: {len(tensors)} tensors, {count} parameters and buffers")
        return 0

    return run_verb(verb, argv)


def convert(source: Path, target: Path, key: str | None = None) -> Tensors:
    """Write the tensors in `source` to `target`, which is then whole or absent, and return them.

    Args:
        source: a file of torch.save.
        target: a new file.
        key: the entry of `source` that is the dict of tensors; None if `source` itself is.

    Raises:
        UsageError: `source` holds no such dict, or what might run code, or `target` exists or
            cannot be written.
    """
    from safetensors.torch import save

    require(
        target.suffix == ".safetensors",
        f"'{target}' is to be a safetensors file; choose a name that ends in .safetensors",
    )
    require(not os.path.lexists(target), f"'{target}' exists; remove it or choose another name")
    tensors = _make_plain(_choose(_read(source), key, source), source)
    try:
        replace_file(target, save(tensors))
    except KeyError as error:
        raise UsageError(
            f"'{source}' has tensors of type {error}, which safetensors does not know; save others"
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
            warnings.simplefilter("ignore")  # about old formats, which do no harm
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text is long, and tells how to run it
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UsageError(
            f"'{source}' holds something else than tensors"
            + (f" ({found.group(1)[:80]!a})" if found else "")
            + "; it is not loaded, since that could run code: where it came from, save the "
            "network's state_dict() alone"
        ) from error
    except Exception as error:  # a damaged or crafted file may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UsageError(
            f"'{source}' cannot be read as a file of torch.save ({reason}); get it again"
        ) from error


def _choose(content: Any, key: str | None, source: Path) -> Tensors:
    """Return the dict of tensors in `content`; a refusal lists what is there instead."""
    from cifar_dist.storage.weights import name_some

    entries = content if isinstance(content, dict) else {}
    chosen = content if key is None else entries.get(key)
    if _is_tensors(chosen):
        return dict(chosen)
    require(
        not _is_tensors(content), f"'{source}' is a dict of tensors itself; leave out --key {key}"
    )
    kinds = [f"{name} ({type(value).__name__})" for name, value in entries.items()]
    fitting = [str(name) for name, value in entries.items() if _is_tensors(value)]
    where = "" if key is None else f" under --key {key}"
    raise UsageError(
        f"'{source}' has no dict of tensors{where}, but "
        + (f"the entries {name_some(kinds)}" if kinds else f"holds a {type(content).__name__}")
        + (
            f"; give --key with one of: {name_some(fitting)}"
            if fitting
            else "; where it came from, save the network's state_dict() alone"
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
    """Return dense copies that share no memory, without a prefix that all names have."""
    import torch

    from cifar_dist.storage.weights import name_some

    size = source.stat().st_size
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.numel() * tensor.element_size() > size  # a few values, repeated without end
    ]
    require(
        not odd,
        f"'{source}' does not hold every value of {name_some(odd)}; save dense tensors on the CPU",
    )
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), "")
    return {
        name.removeprefix(prefix): tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


if __name__ == "__main__":
    sys.exit(main())
