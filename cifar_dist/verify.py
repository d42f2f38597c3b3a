"""Verify checkpoints: `python -m cifar_dist.verify RUN_OR_STEP...`.

Compares the size and SHA-256 of every file with the manifest; a line a checkpoint. The exit code is
0 if all are whole, 1 if one is damaged.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_dist.config import require
from cifar_dist.runtime import run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, verify, print, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        parser = argparse.ArgumentParser("cifar_dist.verify", allow_abbrev=False)
        parser.add_argument("places", nargs="+", metavar="RUN_OR_STEP")
        places = parser.parse_args(list(arguments)).places
        from cifar_dist.checkpoint import DamagedCheckpoint, checkpoints_in, verify

        damaged = 0
        for place in map(Path, places):
            inside = checkpoints_in(place / "checkpoints")
            require(
                bool(inside) or (place.is_dir() and not (place / "checkpoints").is_dir()),
                f"'{place}' holds no checkpoint; name a run folder or one checkpoint's folder",
            )
            for path in inside or [place]:
                try:
                    print(f"{path}: whole, {len(verify(path))} files")
                except DamagedCheckpoint as error:
                    damaged += 1
                    print(f"{path}: damaged: {error}")
        return 1 if damaged else 0

    return run_verb(verb, argv)


if __name__ == "__main__":
    sys.exit(main())
