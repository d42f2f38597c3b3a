"""Train with Ray Train, on this machine or on a Ray cluster:

    pip install "ray[train]"
    python launch/ray_train.py --workers 2 --config tutorial --out /shared/runs/mine

Each worker gets one GPU if the cluster has GPUs, else a CPU. If a worker fails or is lost, Ray
restarts all workers, and training resumes from the newest checkpoint. `--out` must be writable
from every machine of the cluster. Give other paths as absolute paths.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # otherwise each line is printed twice

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cifar_dist.command import run_verb
from cifar_dist.config import parse_recipe
from cifar_dist.train import run


def train(config: dict[str, Any]) -> None:
    """Train as one of the processes. Ray calls this on every worker, each in its own folder."""
    run(config["recipe"], "Ray Train")


def main(arguments: Sequence[str]) -> int:
    """Train with Ray to the end, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options, recipe_options = parser.parse_known_args(arguments)
    out = options.out.absolute()
    recipe, _ = parse_recipe([*recipe_options, "--resume", "auto", "--out", str(out)])
    data = dataclasses.replace(recipe.data, root=str(Path(recipe.data.root).absolute()))
    ray.init()
    TorchTrainer(
        train,
        train_loop_config={"recipe": dataclasses.replace(recipe, data=data)},
        # Longer than the run's own timeout, so that the run reports a missing process, not Ray.
        torch_config=TorchConfig(timeout_s=recipe.train.timeout + 60),
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu="GPU" in ray.cluster_resources()
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
