"""Checkpoints: safetensors and JSON, listed with sizes and hashes, whole or absent; no pickle.

A checkpoint is written beside its place, synced to disk and renamed; older ones go only then. Order
is by step, never by time of change. Links are not followed.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cifar_dist.config import RunError, UsageError, local_path

MANIFEST = "MANIFEST.json"
FAILED_SAVES = 3  # in a row, that end a run
NEEDED = {  # of state.json
    **{"step": int, "epoch": int | float, "recipe": dict, "classes": list, "image_size": int},
    **{"mean": list, "std": list, "dataset": str, "optimizer": dict, "scaler": dict},
    **{"best": dict, "metrics": dict, "reported": dict},
}
Tensors = dict[str, torch.Tensor]


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete, or differs from what was written."""


class SaveFailed(Exception):
    """A checkpoint that could not be written; those before it are as they were."""


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
    """Write `checkpoint` as `folder`/step-<step> and return that path.

    Raises:
        SaveFailed: for want of space, or of a folder that can be written to.
    """
    target = _place(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_links(folder, target, temporary)
        if temporary.exists():  # of a process that was killed
            shutil.rmtree(temporary)
        _require_space(folder, checkpoint)
        temporary.mkdir()
        _write(temporary, checkpoint)
        _commit(temporary, target)
    except (OSError, SafetensorError) as error:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailed(str(error)) from error
    return target


class Saver:
    """Saves in a thread, one checkpoint at a time, so that training goes on meanwhile.

    A save that fails is a warning; several in a row end the run.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._error: Exception | None = None

    def start(self, step: int, commit: Callable[[], object]) -> None:
        """Run `commit`, which saves the checkpoint of `step`; first wait for the save before.

        Raises:
            RunError: too many saves have failed one after another.
        """
        self.wait()

        def run() -> None:
            try:
                commit()
                self._failures.clear()
            except SaveFailed as error:
                self._failures.append(f"the checkpoint of step {step} was not saved: {error}")
                print(f"warning: {self._failures[-1]}; those before are kept", flush=True)
            except Exception as error:  # unexpected: for the thread that trains
                self._error = error

        # A daemon: a second Ctrl-C does not wait for it, and half a checkpoint is none.
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self, final: bool = False) -> None:
        """Wait for the save in hand.

        Args:
            final: nothing follows that could make up for a failed save.

        Raises:
            RunError: too many saves have failed one after another, or the final one has.
        """
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        failed = len(self._failures)
        if failed >= (1 if final else FAILED_SAVES):
            raise RunError(
                f"{self._failures[-1]}"
                + (f" ({failed} failed in a row)" if failed > 1 else "")
                + "; make room or mend the folder, and start the same command again: it continues "
                "from the newest checkpoint"
            )


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing, differs from the manifest, or is not what it should
            be.
    """
    names = verify(path)
    try:
        tensors = {
            name.removesuffix(".safetensors"): load_file(path / name)
            for name in names
            if name.endswith(".safetensors")
        }
        state = json.loads((path / "state.json").read_text())
        wrong = [key for key, kind in NEEDED.items() if not isinstance(state.get(key), kind)]
        wrong += [part for part in ("model", "optim", "processes") if part not in tensors]
        if wrong:
            raise DamagedCheckpoint(f"{path.name}: no {', '.join(wrong)} in it")
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}: {error}") from error
    return Checkpoint(tensors, state)


def verify(path: Path) -> list[str]:
    """Compare every file with the manifest, and return their names.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or differs.
    """
    try:
        _refuse_links(path, path / MANIFEST)
        listed = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in listed.items():
            file = path / name
            if file.parent != path or file.is_symlink():
                raise DamagedCheckpoint(f"{path.name}: {name} is a link or lies elsewhere")
            if file.stat().st_size != expected["size"]:
                raise DamagedCheckpoint(f"{path.name}: the size of {name} differs")
            if _sha256(file) != expected["sha256"]:
                raise DamagedCheckpoint(f"{path.name}: the SHA-256 of {name} differs")
        unknown = {file.name for file in path.iterdir()} - {MANIFEST, *listed}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path.name}: {error}") from error
    if unknown:
        print(f"warning: {path.name} holds unknown files: {', '.join(sorted(unknown))}", flush=True)
    return list(listed)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the committed checkpoints, by step, ascending."""
    return [path for _, path in sorted(_committed(folder).items())]


def load_newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest checkpoint that verifies, or None if there never was one.

    Raises:
        UsageError: there are checkpoints, and all are damaged.
    """
    if folder.is_symlink():
        raise UsageError(f"'{folder}' is a symbolic link; put the folder itself there")
    reasons = []
    for _, path in sorted(_committed(folder).items(), reverse=True):
        try:
            found = load_checkpoint(path)
        except DamagedCheckpoint as error:
            reasons.append(str(error))
        else:
            for reason in reasons:
                print(f"warning: damaged checkpoint {reason}; using {path.name}", flush=True)
            return path, found
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
    path = local_path(place).resolve()  # a link that the user names is meant
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
        path = _place(path / "checkpoints", step)
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"'{place}' is neither a run folder nor a checkpoint (a folder with {MANIFEST})"
        )
    try:
        return path, load_checkpoint(path)
    except DamagedCheckpoint as error:
        raise UsageError(f"the checkpoint is damaged: {error}") from error


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `best`.

    What saves that were killed have left goes too; so nobody else may be saving there.
    """
    committed = _committed(folder)
    for step in sorted(committed)[:-keep]:
        if step != best:  # renamed first: half a removed checkpoint is none
            os.replace(committed[step], folder / f".{_place(folder, step).name}.tmp")
    for path in folder.glob(".step-*"):
        if path not in _committed(folder).values():
            shutil.rmtree(path, ignore_errors=True)


def pack_optimizer(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Split an optimizer's state_dict into tensors and plain values."""
    tensors: Tensors = {}
    groups = [  # a learning rate may be a tensor, for steps that are replayed
        {
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in group.items()
        }
        for group in state["param_groups"]
    ]
    plain: dict[str, Any] = {"param_groups": groups, "state": {}}
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


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _set_aside(target: Path) -> Path:
    """Return where an older checkpoint of the same step waits until the new one is in its place."""
    return target.with_name(f".{target.name}.old")


def _committed(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints by step."""
    names = {path.name: path for path in folder.glob("*") if path.is_dir() or path.is_symlink()}
    found = {}
    for pattern in (r"\.step-(\d+)\.old", r"step-(\d+)"):  # the second kind is the newer one
        for name, path in names.items():
            if match := re.fullmatch(pattern, name):
                found[int(match.group(1))] = path
    return found


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    for name, tensors in checkpoint.tensors.items():
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(plain, folder / f"{name}.safetensors")
    (folder / "state.json").write_text(json.dumps(checkpoint.state, indent=1))
    listed = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1))
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _commit(temporary: Path, target: Path) -> None:
    """Put a folder in its place; at every moment the new one or the old one can be found."""
    aside = _set_aside(target)
    if target.exists():
        if aside.exists():
            shutil.rmtree(aside)
        os.replace(target, aside)
    os.replace(temporary, target)
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise OSError(f"'{path}' is a symbolic link, which is not followed")


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    sizes = [t.nbytes for tensors in checkpoint.tensors.values() for t in tensors.values()]
    needed, free = sum(sizes) + (1 << 16), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"disk full: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free at '{folder}'"
        )


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
