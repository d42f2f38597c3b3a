"""Turn weights of torch.save into safetensors: `python -m cifar_dist.convert IN.pt OUT.safetensors`.

The only place that reads a pickle, and only its tensors: anything else in it is refused, never run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_dist.config import UsageError, require
from cifar_dist.runtime import run_verb

if TYPE_CHECKING:
    from cifar_dist.checkpoint import Tensors

PREFIXES = ("module.", "_orig_mod.")  # that DDP and torch.compile put before every name


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, print, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        parser = argparse.ArgumentParser("cifar_dist.convert", allow_abbrev=False)
        parser.add_argument("source", type=Path, metavar="IN.pt", help="file of torch.save")
        parser.add_argument("target", type=Path, metavar="OUT.safetensors", help="file to write")
        parser.add_argument("--key", help="entry that holds the weights, such as state_dict")
        options = parser.parse_args(list(arguments))
        tensors = convert(options.source, options.target, options.key)
        count = sum(tensor.numel() for tensor in tensors.values())
        print(f"{options.target}: {len(tensors)} tensors, {count} parameters and buffers")
        return 0

    return run_verb(verb, argv)


def convert(source: Path, target: Path, key: str | None = None) -> Tensors:
    """Write the tensors in `source` to `target`, and return them.

    Args:
        source: a file of torch.save with a dict of tensors.
        target: a new file; it is there whole or not at all.
        key: the entry of `source` that is the dict of tensors; None: `source` itself is.

    Raises:
        UsageError: `source` holds no such dict, or holds more than data, or `target` exists or
            cannot be written.
    """
    import tempfile

    require(
        target.suffix == ".safetensors",
        f"'{target}' is to be a safetensors file; give it a name that ends in .safetensors",
    )
    require(not os.path.lexists(target), f"'{target}' exists; remove it, or choose another name")
    content = _pack(_strip(_choose(source, _read(source), key)), source)
    try:
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as folder:
            written = Path(folder) / target.name
            written.write_bytes(content)
            os.replace(written, target)
    except OSError as error:
        raise UsageError(f"'{target}' cannot be written: {error}; choose another place") from error
    return tensors
