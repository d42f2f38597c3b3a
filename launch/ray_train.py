"""Train with Ray Train, on this machine or on the Ray cluster it belongs to:

    pip install "ray[train]"
    python launch/ray_train.py --workers 2 --config tutorial --out /shared/runs/mine

Each worker gets a GPU where the cluster has some, else a CPU. A worker that fails or is lost
restarts all, and training continues from the newest checkpoint. `--out` lies where every machine
of the cluster can write; what else is a path, give in full.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # else every line comes twice

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cifar_dist.command import run_verb
from cifar_dist.config import parse_recipe
from cifar_dist.train import run


def train(config: dict[str, Any]) -> None:
    """Be one of the processes; Ray calls it on every worker, in a folder of its own."""
    run(config["recipe"], "Ray Train")


def main(arguments: Sequence[str]) -> int:
    """Have Ray train until it is done, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    own, options = parser.parse_known_args(arguments)
    out = own.out.absolute()
    recipe, _ = parse_recipe([*options, "--resume", "auto", "--out", str(out)])
    data = dataclasses.replace(recipe.data, root=str(Path(recipe.data.root).absolute()))
    ray.init()
    TorchTrainer(
        train,
        train_loop_config={"recipe": dataclasses.replace(recipe, data=data)},
        # A minute more than the run itself waits for a process: it is the one to say what is wrong.
        torch_config=TorchConfig(timeout_s=recipe.train.timeout + 60),
        scaling_config=ScalingConfig(
            num_workers=own.workers, use_gpu="GPU" in ray.cluster_resources()
        ),
        run_config=RunConfig(
            name=out.name,
            storage_path=str(out.parent / "ray"),
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, None))
