"""Verify checkpoints: `cifar-dist verify RUN...`.

Compares the size and SHA-256 of every file with the manifest, and prints one line per checkpoint.
The exit code is 0 if all are intact, 1 if one is damaged or not readable by this user.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_dist.command import Parser, command
from cifar_dist.errors import require


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, verify, print, and return the exit code."""
    parser = Parser("verify", __doc__)
    parser.add_argument("places", nargs="+", metavar="RUN", help="run folder or checkpoint")
    places = parser.read(argv).places
    results = [_verify_all(place) for place in map(Path, places)]
    return 0 if all(results) else 1


def _verify_all(place: Path) -> bool:
    """Verify one checkpoint or all of a run, and return whether all are intact and readable."""
    from cifar_dist.storage.checkpoint import checkpoints_in

    try:
        inside = checkpoints_in(place / "checkpoints")
        require(
            bool(inside) or (place.is_dir() and not (place / "checkpoints").is_dir()),
            f"'{place}' has no checkpoint; give a run folder or the folder of one checkpoint",
        )
    except PermissionError as error:
        print(_not_readable(place, error))
        return False
    results = [_verify_one(path) for path in inside or [place]]
    return all(results)


def _verify_one(path: Path) -> bool:
    from cifar_dist.storage.checkpoint import DamagedCheckpoint, RemovedCheckpoint, verify

    try:
        print(f"{path}: whole, {len(verify(path))} files")
    except RemovedCheckpoint:
        print(f"{path}: removed by its run meanwhile")
    except DamagedCheckpoint as error:
        print(f"{path}: damaged: {error}")
        return False
    except PermissionError as error:
        print(_not_readable(path, error))
        return False
    return True


def _not_readable(path: Path, error: PermissionError) -> str:
    return f"{path}: not readable: {error.filename}: {error.strerror}"


if __name__ == "__main__":
    sys.exit(main())
