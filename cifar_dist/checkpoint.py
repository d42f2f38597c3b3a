"""Checkpoints: safetensors and JSON, listed with sizes and hashes, whole or absent; no pickle.

A checkpoint is written beside its place, synced to disk and renamed; older ones go only then.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cifar_dist.config import UsageError

MANIFEST = "MANIFEST.json"
Tensors = dict[str, torch.Tensor]


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete, or differs from what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: by file: "model", "optim" and, with averaged weights, "ema".
        state: everything else, plain values.
    """

    tensors: dict[str, Tensors]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` as `folder`/step-<step> and return that path."""
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    temporary.mkdir(parents=True)
    for name, tensors in checkpoint.tensors.items():
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(plain, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
    listed = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(temporary.iterdir())
    }
    (temporary / MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    if target.exists():  # left by a run that was continued from an earlier step
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync(folder)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing or differs from the manifest.
    """
    verify(path)
    try:
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return Checkpoint(tensors, json.loads((path / "state.json").read_text()))
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path.name}: {error}") from error


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or differs.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in listed.items():
            file = path / name
            if file.stat().st_size != expected["size"]:
                raise DamagedCheckpoint(f"{path.name}: the size of {name} differs")
            if _sha256(file) != expected["sha256"]:
                raise DamagedCheckpoint(f"{path.name}: the SHA-256 of {name} differs")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path.name}: {error}") from error


def steps_saved(folder: Path) -> list[int]:
    """Return the steps with a committed checkpoint, ascending."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name.group(1)) for name in names if name)


def load_newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest checkpoint that verifies, or None if there never was one.

    Raises:
        UsageError: there are checkpoints, and all are damaged.
    """
    reasons = []
    for step in reversed(steps_saved(folder)):
        path = folder / f"step-{step:08d}"
        try:
            return path, load_checkpoint(path)
        except DamagedCheckpoint as error:
            reasons.append(str(error))
            print(f"warning: checkpoint is damaged, trying the one before: {error}", flush=True)
    if reasons:
        raise UsageError(
            f"no checkpoint in '{folder}' is whole ({'; '.join(reasons)}); restore one, or start "
            "anew with another --out"
        )
    return None


def find_checkpoint(place: str, best: bool = False) -> tuple[Path, Checkpoint]:
    """Load what the user named.

    Args:
        place: a run folder (its newest checkpoint is meant) or one checkpoint's folder.
        best: of a run folder, the best by validation accuracy instead.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    path = Path(place).expanduser()
    if (path / "checkpoints").is_dir():
        newest = load_newest(path / "checkpoints")
        if newest is None:
            raise UsageError(f"the run in '{place}' has not saved a checkpoint yet")
        if not best:
            return newest
        step = newest[1].state["best"]["step"]
        if step is None:
            raise UsageError(
                f"the run in '{place}' held out no validation images (data.val_fraction), so it "
                "has no best checkpoint; leave out --best for the newest"
            )
        path = path / "checkpoints" / f"step-{step:08d}"
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"'{place}' is neither a run folder nor a checkpoint (a folder with {MANIFEST})"
        )
    try:
        return path, load_checkpoint(path)
    except DamagedCheckpoint as error:
        raise UsageError(f"the checkpoint is damaged: {error}") from error


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `best`."""
    for step in steps_saved(folder)[:-keep]:
        if step != best:
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)


def pack_optimizer(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Split an optimizer's state_dict into tensors and plain values."""
    tensors: Tensors = {}
    plain: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                plain["state"].setdefault(str(index), {})[name] = value
    return tensors, plain


def unpack_optimizer(tensors: Tensors, plain: dict[str, Any]) -> dict[str, Any]:
    """Undo `pack_optimizer`."""
    state: dict[int, dict[str, Any]] = {
        int(index): dict(values) for index, values in plain["state"].items()
    }
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    return {"param_groups": plain["param_groups"], "state": state}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
