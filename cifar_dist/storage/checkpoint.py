"""Checkpoints: safetensors and JSON with a manifest of sizes and hashes, complete or absent.

This is the only file that knows the names and contents of a checkpoint's files. None is a pickle.

A checkpoint is written to a temporary folder, synced to disk and renamed. Only then are older ones
removed. Checkpoints are ordered by step, never by modification time. Symbolic links are refused.

Checkpoints can be read while a run saves and removes them: the read is then repeated. A file that
this user may not read raises PermissionError and never counts as damaged or missing.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from cifar_dist import files
from cifar_dist.config import Recipe, from_dict, local_path, to_dict
from cifar_dist.errors import RunError, UsageError, require

MANIFEST = "MANIFEST.json"
STATE = "state.json"
MODEL, AVERAGE = "model.safetensors", "ema.safetensors"
OPTIM, PROCESSES = "optim.safetensors", "processes.safetensors"
FAILED_SAVES = 3  # consecutive failures that end a run
ATTEMPTS = 50  # to read a checkpoint that a run is replacing or removing
Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


class DamagedCheckpoint(Exception):
    """A checkpoint that is incomplete or differs from its manifest."""


class RemovedCheckpoint(DamagedCheckpoint):
    """A checkpoint that does not exist, or that a run has removed in the meantime."""


class SaveFailed(Exception):
    """A checkpoint that could not be written; older checkpoints are unchanged."""


@dataclass(frozen=True)
class Best:
    """The best epoch so far by validation accuracy.

    Attributes:
        step: its last step; None before the first validation.
        metrics: its lines of metrics.jsonl, by split.
    """

    step: int | None = None
    accuracy: float = -1.0
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Contents of state.json: the run that the checkpoint belongs to, and its progress.

    Attributes:
        classes: names, in the order of the labels.
        image_size: of the training images, in pixels.
        mean, std: of the training images by channel, for normalisation.
        dataset: digest of the training images and their labels.
        step: optimizer steps done.
        epoch: epochs trained and evaluated; the last may be a fraction of one.
        reported: sums of this epoch when the training loss was last recorded; see `Totals`.
        metrics: lines of the last evaluation, by split.
        optimizer: what `pack_optimizer` returns besides tensors.
        scaler: state of fp16's loss scaling; empty without it.
        code: SHA-256 of the user's source files, {recipe key: {file: hash}}.
    """

    recipe: Recipe
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    dataset: str
    step: int = 0
    epoch: float = 0
    reported: dict[str, Any] = field(default_factory=dict)
    best: Best = field(default_factory=Best)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    code: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**dataclasses.asdict(self), "recipe": to_dict(self.recipe)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """Rebuild what `to_json` returned, here or in an earlier version.

        Raises:
            UsageError: the recipe is of another version.
            TypeError, ValueError: a value is missing or of another type.
        """
        values = {"code": {}, **values}  # earlier versions did not write it
        kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(cls).items()}
        kinds |= {"epoch": int | float, "recipe": dict, "best": dict}
        wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
        if wrong:
            raise ValueError(f"no {', '.join(wrong)} in it")
        rebuilt = {"recipe": from_dict(values["recipe"]), "best": Best(**values["best"])}
        return cls(**{name: values[name] for name in kinds} | rebuilt)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        model: weights and buffers by name; BatchNorm statistics are the mean over all ranks.
        optim: tensors of the optimizer, as `pack_optimizer` names them.
        statistics: BatchNorm statistics of each rank, float [ranks, N].
        tallies: metrics of each rank in this epoch, float [ranks, 3]; see `Tally`.
        ema: moving average of the model, if there is one.
    """

    progress: Progress
    model: Tensors
    optim: Tensors
    statistics: torch.Tensor
    tallies: torch.Tensor
    ema: Tensors | None = None

    def files(self) -> dict[str, Tensors]:
        """Return the tensors of each file, by its name."""
        processes = {"statistics": self.statistics, "tallies": self.tallies}
        found = {MODEL: self.model, OPTIM: self.optim, PROCESSES: processes}
        return found if self.ema is None else {**found, AVERAGE: self.ema}


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` as `folder`/step-<step> and return that path.

    Raises:
        SaveFailed: the disk is full or the folder cannot be written.
    """
    target = _place(folder, step)
    temporary = folder / f".{target.name}.tmp"
    try:
        if not folder.exists():
            folder.mkdir(parents=True)
            files.sync(folder.parent)
        _refuse_links(folder, target, temporary)
        if temporary.exists():  # left by a process that was killed
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
    """Saves checkpoints in a daemon thread, one at a time, while training continues.

    A failed save is a warning. FAILED_SAVES consecutive failures end the run.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failures: list[str] = []
        self._error: Exception | None = None

    def start(self, step: int, commit: Callable[[], object]) -> None:
        """Run `commit`, which saves the checkpoint of `step`, after the previous save has ended.

        Raises:
            RunError: FAILED_SAVES consecutive saves have failed.
        """
        self.wait()

        def run() -> None:
            try:
                commit()
                self._failures.clear()
            except SaveFailed as error:
                self._failures.append(f"the checkpoint of step {step} was not saved: {error}")
                print(f"warning: {self._failures[-1]}; older ones are kept", flush=True)
            except Exception as error:  # unexpected: `wait` raises it in the training thread
                self._error = error

        # A daemon thread, so that a second Ctrl-C does not wait for it. A partial checkpoint is
        # never used.
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self, final: bool = False) -> None:
        """Wait for the current save.

        Args:
            final: no other save follows, so a single failure ends the run.

        Raises:
            RunError: FAILED_SAVES consecutive saves have failed, or the final one has.
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
                + "; free disk space or repair the folder, and start the same command again: it "
                "resumes from the newest checkpoint"
            )


def _at_rest(read: Callable[[Path], T]) -> Callable[[Path], T]:
    """Make `read(path)` start again if the folder was replaced or removed meanwhile."""

    def identity(path: Path) -> tuple[int, int]:
        try:
            status = path.lstat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RemovedCheckpoint(f"{path.name} is missing") from error
        return status.st_ino, status.st_ctime_ns

    @functools.wraps(read)
    def read_at_rest(path: Path) -> T:
        for _ in range(ATTEMPTS):
            before = identity(path)
            try:
                result = read(path)
            except Exception:
                if identity(path) == before:
                    raise
            else:
                if identity(path) == before:
                    return result
        raise RemovedCheckpoint(f"{path.name} is replaced faster than it can be read")

    return read_at_rest


@_at_rest
def load_checkpoint(path: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        DamagedCheckpoint: a file is missing, differs from the manifest, or is not valid.
        PermissionError: this user may not read it.
    """
    names = verify(path)
    with _damage_named(path):
        tensors = {name: read_tensors(path / name) for name in names if name != STATE}
        wrong = [name for name in (MODEL, OPTIM, PROCESSES) if name not in tensors]
        if wrong:
            raise DamagedCheckpoint(f"{path.name}: no {', '.join(wrong)} in it")
        return Checkpoint(
            progress=_parse_progress(path),
            model=tensors[MODEL],
            optim=tensors[OPTIM],
            ema=tensors.get(AVERAGE),
            **tensors[PROCESSES],
        )


@_at_rest
def verify(path: Path) -> list[str]:
    """Compare every file with the manifest, and return their names.

    Raises:
        DamagedCheckpoint: a file is missing or differs; names the first one.
        PermissionError: this user may not read it.
    """
    with _damage_named(path):
        hashes = _read_manifest(path)
        _check_hashes(path, hashes, *hashes)
        unknown = {file.name for file in path.iterdir()} - {MANIFEST, *hashes}
    if unknown:
        print(f"warning: {path.name} holds unknown files: {', '.join(sorted(unknown))}", flush=True)
    return list(hashes)


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the committed checkpoints in ascending order of their steps.

    Raises:
        PermissionError: this user may not list the folder.
    """
    return [path for _, path in sorted(_committed(folder).items())]


def load_newest(folder: Path) -> tuple[Path, Checkpoint] | None:
    """Return the newest checkpoint that verifies, or None if there are no checkpoints.

    Raises:
        UsageError: all checkpoints are damaged, or this user may not read the newest intact one.
    """
    return _choose(folder, load_checkpoint)


def newest_progress(folder: Path) -> Progress | None:
    """Return the progress of the newest checkpoint, or None if there are no checkpoints.

    Raises:
        UsageError: as of `load_newest`.
    """
    found = _choose(folder, _load_progress)
    return found[1] if found else None


def find_checkpoint(place: str, best: bool = False) -> tuple[Path, Checkpoint]:
    """Load the checkpoint that the user named.

    Args:
        place: a run folder (for its newest checkpoint) or the folder of one checkpoint.
        best: from a run folder, load the best checkpoint by validation accuracy instead.

    Raises:
        UsageError: there is none, it is damaged, or this user may not read it.
    """
    return _find(place, best, load_checkpoint)


def find_progress(place: str, best: bool = False) -> tuple[Path, Progress]:
    """Load the progress of the checkpoint that `find_checkpoint` would return, without tensors.

    It does not warn of damaged checkpoints: loading the weights does.
    """
    return _find(place, best, _load_progress, warn=False)


def find_weights(place: str, best: bool = False) -> tuple[Path, tuple[Progress, Tensors]]:
    """Load the progress and the weights to evaluate of the checkpoint that the user named.

    The weights are their moving average if the checkpoint has one. The optimizer is not read.
    """
    return _find(place, best, _load_weights)


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the one of step `best`.

    Also removes leftovers of interrupted saves; must not run concurrently with a save.
    """
    _remove_leftovers(folder)  # a leftover may have the name to which a checkpoint is renamed below
    committed = _committed(folder)
    for step in sorted(committed)[:-keep]:
        if step != best:  # renamed first, so that a partly removed checkpoint is never used
            os.replace(committed[step], folder / f".{_place(folder, step).name}.tmp")
    files.sync(folder)
    _remove_leftovers(folder)


def pack_optimizer(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Split an optimizer's state_dict into tensors and plain values."""
    tensors: Tensors = {}
    groups = [  # a learning rate is a tensor if the step is a CUDA graph
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


def _committed(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints by step."""
    try:
        with os.scandir(folder) as entries:
            names = {e.name for e in entries if e.is_symlink() or e.is_dir()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for pattern in (r"\.step-(\d+)\.old", r"step-(\d+)"):  # the second is newer
        for name in names:
            if match := re.fullmatch(pattern, name):
                found[int(match.group(1))] = folder / name
    return found


def _exists(path: Path) -> bool:
    """Return whether `path` exists; raise PermissionError if this user may not look there."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


@contextmanager
def _permissions_named() -> Iterator[None]:
    """Within the block, turn PermissionError into a UsageError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise UsageError(
            f"'{error.filename}' cannot be read by this user ({error.strerror}); correct its "
            "permissions or its owner, and try again"
        ) from error


@_permissions_named()
def _find(place: str, best: bool, read: Callable[[Path], T], warn: bool = True) -> tuple[Path, T]:
    path = local_path(place).resolve()  # a link that the user names is meant
    try:
        if _exists(path / "checkpoints"):
            found = _choose(path / "checkpoints", read, best, warn)
            if found is None:
                raise UsageError(f"the run in '{place}' has not saved a checkpoint yet")
            return found
        require(
            _exists(path / MANIFEST),
            f"'{place}' is neither a run folder nor a checkpoint (a folder with {MANIFEST})",
        )
        return path, read(path)
    except DamagedCheckpoint as error:
        raise UsageError(f"the checkpoint is damaged: {error}") from error


@_permissions_named()
def _choose(
    folder: Path, read: Callable[[Path], T], best: bool = False, warn: bool = True
) -> tuple[Path, T] | None:
    """Read the newest or the best checkpoint. Retry if a run removes it meanwhile."""
    for _ in range(ATTEMPTS):
        with suppress(RemovedCheckpoint):
            return (_best if best else _newest)(folder, read, warn)
    raise UsageError(
        f"the checkpoints in '{folder}' are removed faster than they can be read; try again after "
        "the run has ended"
    )


def _newest(folder: Path, read: Callable[[Path], T], warn: bool) -> tuple[Path, T] | None:
    require(not folder.is_symlink(), f"'{folder}' is a symbolic link; put the folder itself there")
    reasons = []
    for path in reversed(checkpoints_in(folder)):
        try:
            found = read(path)
        except RemovedCheckpoint:
            raise
        except DamagedCheckpoint as error:
            reasons.append(str(error))
        else:
            for reason in reasons if warn else ():
                print(f"warning: damaged checkpoint {reason}; using {path.name}", flush=True)
            return path, found
    require(
        not reasons,
        f"no checkpoint in '{folder}' is whole ({'; '.join(reasons)}); restore one, or start a new "
        "run with another --out",
    )
    return None


def _best(folder: Path, read: Callable[[Path], T], warn: bool) -> tuple[Path, T] | None:
    """Return the best checkpoint by validation accuracy, which the newest one names."""
    newest = _newest(folder, _load_progress, warn)
    if newest is None:
        return None
    step = newest[1].best.step
    if step is None:
        raise UsageError(
            f"the run in '{folder.parent}' has no validation split (data.val_fraction), so it has "
            "no best checkpoint; leave out --best for the newest"
        )
    committed = _committed(folder)
    if step not in committed and committed.get(max(committed, default=0)) == newest[0]:
        raise UsageError(
            f"the best checkpoint, '{_place(folder, step)}', is missing; restore it, or leave out "
            "--best for the newest"
        )
    path = committed.get(step, _place(folder, step))
    return path, read(path)


@_at_rest
def _load_progress(path: Path) -> Progress:
    with _damage_named(path):
        _check_hashes(path, _read_manifest(path), STATE)
        return _parse_progress(path)


@_at_rest
def _load_weights(path: Path) -> tuple[Progress, Tensors]:
    with _damage_named(path):
        hashes = _read_manifest(path)
        name = AVERAGE if AVERAGE in hashes else MODEL
        _check_hashes(path, hashes, STATE, name)
        return _parse_progress(path), read_tensors(path / name)


def _parse_progress(path: Path) -> Progress:
    return Progress.from_json(json.loads((path / STATE).read_text(encoding="utf-8")))


def _read_manifest(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in the manifest, after checking that its size is right."""
    _refuse_links(path, path / MANIFEST)
    listed = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, expected in listed.items():
        file = path / name
        if file.parent != path or file.is_symlink():
            raise DamagedCheckpoint(f"{path.name}: {name} is a link or lies elsewhere")
        if file.stat().st_size != expected["size"]:
            raise DamagedCheckpoint(f"{path.name}: the size of {name} differs")
    return {name: expected["sha256"] for name, expected in listed.items()}


def _check_hashes(path: Path, hashes: dict[str, str], *names: str) -> None:
    for name in names:
        if name not in hashes:
            raise DamagedCheckpoint(f"{path.name}: no {name} in it")
        with (path / name).open("rb") as file:
            if files.sha256_of(file) != hashes[name]:
                raise DamagedCheckpoint(f"{path.name}: the SHA-256 of {name} differs")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Within the block, turn every error of reading into DamagedCheckpoint."""
    try:
        yield
    except PermissionError:
        raise
    except (
        *(SafetensorError, OSError, ValueError, KeyError, TypeError),
        *(AttributeError, RecursionError),
    ) as error:
        raise DamagedCheckpoint(f"{path.name}: {error}") from error


def _remove_leftovers(folder: Path) -> None:
    """Remove partial checkpoints, and those that a newer one of the same step has replaced."""
    committed = _committed(folder).values()
    for path in folder.glob(".step-*"):
        if path not in committed:
            shutil.rmtree(path, ignore_errors=True)


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    state = folder / STATE
    state.write_text(json.dumps(checkpoint.progress.to_json(), indent=1), encoding="utf-8")
    for name, tensors in checkpoint.files().items():
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(plain, folder / name)
        shutil.copymode(state, folder / name)  # save_file gives 0600
    listed = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            listed[path.name] = {"size": path.stat().st_size, "sha256": files.sha256_of(file)}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")


def _commit(temporary: Path, target: Path) -> None:
    """Rename a folder to `target`; at every moment the old or the new checkpoint can be found."""
    aside = target.with_name(f".{target.name}.old")  # for an older checkpoint of the same step
    if target.exists() and aside.exists():
        shutil.rmtree(aside)
    files.put_in_place(temporary, target, aside)
    if aside.exists():
        os.replace(aside, temporary)  # renamed first, so that a partial one is never used
    shutil.rmtree(temporary, ignore_errors=True)


def _refuse_links(*paths: Path) -> None:
    for path in paths:
        if path.is_symlink():
            raise OSError(f"'{path}' is a symbolic link, which is not followed")


def _require_space(folder: Path, checkpoint: Checkpoint) -> None:
    sizes = [t.nbytes for tensors in checkpoint.files().values() for t in tensors.values()]
    needed, free = sum(sizes) + (1 << 16), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"disk full: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free at '{folder}'"
        )


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file.

    Raises:
        SafetensorError: it is not a valid safetensors file.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:  # safetensors cannot open such a path
        return load(path.read_bytes())
    return load_file(path)
