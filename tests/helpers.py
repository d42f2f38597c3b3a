"""Helpers for tests: start real processes, and write small datasets."""

import ctypes
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar_dist.data.synthetic import draw

# A run of about a second: the tutorial network without dropout on a few synthetic images.
TINY = [
    *("--config", "smoke", "--model.name", "tutorial", "--data.limit_train", "320"),
    *("--data.limit_test", "100", "--train.epochs", "2", "--train.batch_size", "32"),
    *("--optim.name", "sgd", "--optim.lr", "0.02", "--schedule.name", "constant"),
    *("--track.every_steps", "1", "--track.log_with", "[]"),
]
# The same at a learning rate at which rounding does not grow: the number of correct images is equal
# on any number of processes.
JOB = [*TINY, "--optim.lr", "0.01", "--train.seed", "1"]
Integers = list[tuple[int, int, int]]
# The tutorials' file, with the layers of the shipped network `tutorial`.
TUTORIAL = """
import torch
from torch import nn

class MyModel(nn.Module):
    def __init__(self):
        super(MyModel, self).__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 32, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, 1, 2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        x = self.model(x)
        return x

if __name__ == "__main__":
    raise SystemExit("executed")
"""


def command(
    processes: int = 1, launcher: str = "torchrun", module: str = "cifar_dist.train"
) -> list[str]:
    """Return the command line that starts `module` on some processes."""
    if processes == 1 and launcher == "torchrun":
        return [sys.executable, "-m", module]
    if launcher == "accelerate":
        flags = ["--multi_gpu"] if processes > 1 else []
        flags += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        flags += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
        return [_script("accelerate"), "launch", *flags, "-m", module]
    return [_script("torchrun"), "--standalone", "--nproc_per_node", str(processes), "-m", module]


def by_mpi(own: list[str]) -> list[str]:
    """Return a command that starts `own` twice, with the variables of Open MPI but without MPI."""
    names = ("SIZE=2", "RANK=$rank", "LOCAL_SIZE=2", "LOCAL_RANK=$rank")
    variables = " ".join(f"OMPI_COMM_WORLD_{name}" for name in names)
    script = f'for rank in 0 1; do {variables} "$@" & done; wait -n && wait -n'
    return ["env", f"MASTER_PORT={free_port()}", "bash", "-c", script, "mpirun", *own]


def run_command(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command for 5 minutes at most, and return its output and exit code."""
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )


def read_lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def tested(out: Path) -> Integers:
    """Return step, correct and count of each evaluation of a run on its test images."""
    lines = [line for line in read_lines(out) if line["split"] == "test"]
    return [(line["step"], line["correct"], line["count"]) for line in lines]


def digest_of(out: Path) -> str:
    """Return the SHA-256 of the newest checkpoint's weights, from its manifest."""
    newest = max((out / "checkpoints").iterdir())
    manifest = json.loads((newest / "MANIFEST.json").read_text())
    return str(manifest["files"]["model.safetensors"]["sha256"])


def write_folder(root: Path, counts: dict[str, int], classes: int = 3, size: int = 32) -> Path:
    """Write synthetic images as PNG files.

    Args:
        counts: total number of images of each split, such as {"train": 30, "test": 9}.
    """
    for number, (split, count) in enumerate(counts.items()):
        images = draw(count * 10, size, seed=(7, number))
        for label in range(classes):
            folder = root / split / images.classes[label]
            folder.mkdir(parents=True)
            for row in np.flatnonzero(images.labels == label)[: count // classes]:
                Image.fromarray(images.images[row]).save(folder / f"{row:05d}.png")
    return root


def status_of(out: Path) -> dict[str, Any]:
    """Return the content of status.json."""
    return dict(json.loads((out / "status.json").read_text()))


class Bomb:
    """An object whose unpickling creates the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@contextmanager
def obeying_modes() -> Iterator[None]:
    """Make this thread obey file modes within the block, even as root."""
    if os.geteuid() != 0:
        yield
        return
    if sys.platform != "linux":
        pytest.skip("root can drop the capability to ignore file modes on Linux only")
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~0b110  # effective CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def needs(*names: str) -> None:
    """Skip the test if one of these programs or packages is not installed.

    With REQUIRE_PROGRAMS in the environment, as in .ci/run, the test fails instead.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    absent = [
        name
        for name in names
        if not (shutil.which(name, path=path) or importlib.util.find_spec(name))
    ]
    if absent:
        end = pytest.fail if os.environ.get("REQUIRE_PROGRAMS") else pytest.skip
        end(f"not installed: {', '.join(absent)}")


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
