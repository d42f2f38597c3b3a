"""Run launch/ray_train.py, with a worker that is killed in the first attempt."""

import os
import sys
from pathlib import Path
from typing import Any

import ray_train

from tests.faults.inject import inject


def train(config: dict[str, Any]) -> None:
    """Train as the script does; in the first attempt, SIGKILL rank 1 after step 6."""
    mark = Path(config["recipe"].out).with_name("killed")
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        inject("is_killed 6 1")
    ray_train.train(config)  # the original: on a worker the module is not patched


if __name__ == "__main__":
    ray_train.train = train
    ray_train.main(sys.argv[1:])
