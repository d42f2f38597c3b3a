"""The run folder: the files of a run besides its checkpoints, each complete or absent.

recipe.yaml is the resolved recipe, run.json the machine and the versions, status.json the state of
the run, and metrics.jsonl has one JSON object per line. Only rank 0 writes.
"""

import errno
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from cifar_dist import __version__
from cifar_dist.config import Recipe, differences, dump_recipe, load_recipe, local_path
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.files import replace_file

LINE = {"split": str, "epoch": int, "step": int}  # keys of every line of metrics.jsonl


class RunLock:
    """Held by the one run that may write to a run folder.

    The kernel releases it when the process ends, however it ends, so there is no stale lock.
    """

    def __init__(self) -> None:
        self._lock: filelock.BaseFileLock | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def held(self) -> bool:
        """Whether `take` has locked a folder."""
        return self._lock is not None

    def take(self, out: Path) -> None:
        """Lock the folder `out`, unless this object holds a lock already.

        Raises:
            UsageError: another run holds the lock; names its process and host.
            OSError: the folder cannot be written.
        """
        if self.held:
            return
        lock = filelock.FileLock(out / ".lock", timeout=0)
        owner = out / ".lock-owner"  # a file of its own: Windows lets nobody read a locked file
        try:
            lock.acquire()
        except filelock.Timeout as error:
            holder = "another process"
            with suppress(OSError):
                holder = owner.read_text(encoding="utf-8", errors="replace")
            raise UsageError(
                f"'{out}' is in use by {holder}; wait for that run, stop it, or name another "
                "folder with --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"warning: '{out}' cannot be locked ({error.strerror}); start one run only there")
        self._lock = lock
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")


def check_out(recipe: Recipe, lock: RunLock) -> None:
    """Refuse a run folder that cannot be used, before the dataset is read; lock an existing one.

    Raises:
        UsageError: it holds a run of another recipe (names the keys that differ), is in use, or
            cannot be written.
    """
    out = local_path(recipe.out or "runs")
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        reason = "cannot be written" if existing.is_dir() else "is not a folder"
        raise UsageError(
            f"the run folder '{out}' cannot be used: '{existing}' {reason}; name another with --out"
        )
    if recipe.out and out.is_dir():
        with _usable(out):
            lock.take(out)
        _check_checkpoints(out)
        _check_recipe(recipe, out)


def default_out(recipe: Recipe) -> Path:
    """Return the path of a new run folder, named after the recipe and the time."""
    out = local_path(f"runs/{recipe.name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}")
    while out.exists():  # another run started in the same second
        out = out.with_name(f"{out.name}-again")
    return out


def claim(recipe: Recipe, lock: RunLock) -> Path:
    """Create the run folder if necessary, lock it, write recipe.yaml and return its path.

    Raises:
        UsageError: it cannot be written, or another run has locked it in the meantime.
    """
    out = local_path(recipe.out) if recipe.out else default_out(recipe)
    with _usable(out):
        out.mkdir(parents=True, exist_ok=bool(recipe.out))
        if not lock.held:
            lock.take(out)
            _check_recipe(recipe, out)
        damage = _damage_of(out / "recipe.yaml")
        replace_file(out / "recipe.yaml", dump_recipe(recipe))
    if damage:
        print(f"warning: {damage}; it is written again, as the checkpoint's recipe", flush=True)
    return out


@contextmanager
def _usable(out: Path) -> Iterator[None]:
    """Within the block, turn OSError into a UsageError about the run folder."""
    try:
        yield
    except OSError as error:
        place = f": '{error.filename}'" if error.filename else ""
        raise UsageError(
            f"the run folder '{out}' cannot be used ({error.strerror}{place}); name another with "
            "--out"
        ) from error


def _check_checkpoints(out: Path) -> None:
    """Refuse a folder of checkpoints in which every save would fail."""
    folder = out / "checkpoints"
    require(not folder.is_symlink(), f"'{folder}' is a symbolic link; put the folder itself there")
    usable = folder.is_dir() and os.access(folder, os.R_OK | os.W_OK | os.X_OK)
    if os.path.lexists(folder) and not usable:
        reason = "cannot be read and written" if folder.is_dir() else "is not a folder"
        raise UsageError(
            f"the run folder '{out}' cannot be used: '{folder}' {reason}; name another with --out"
        )


def _check_recipe(recipe: Recipe, out: Path) -> None:
    path = out / "recipe.yaml"
    saved = any(
        next((out / "checkpoints").glob(names), None) for names in ("step-*", ".step-*.old")
    )
    if not saved and not (os.path.lexists(path) and os.path.lexists(out / "status.json")):
        return  # no run, or a run that was refused before it started
    require(
        recipe.resume == "auto",
        f"'{out}' already holds a run; name another folder with --out, or continue that run with "
        "--resume auto",
    )
    damage = _damage_of(path)
    if saved and (damage or not os.path.lexists(path)):
        return  # checkpoints contain the recipe too; it is compared when one is loaded
    require(
        not damage,
        f"{damage}, and no checkpoint in '{out}' holds the recipe; name another folder with --out",
    )
    found = differences(load_recipe(path), recipe)
    require(
        not found,
        f"'{out}' holds a run of another recipe ({'; '.join(found)}); name another folder with "
        "--out, or use the same recipe to continue",
    )


def _damage_of(path: Path) -> str:
    """Return why an existing recipe cannot be used, or ""."""
    if os.path.lexists(path):
        try:
            load_recipe(path)
        except UsageError as error:
            return str(error)
    return ""


class Warned:
    """Keeps logging and tracking failures from ending the run; each is reported once.

    Attributes:
        reasons: the reason of each failure by the name of what failed, in order.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    @contextmanager
    def spare(self, what: str) -> Iterator[None]:
        """Within the block, turn any Exception into a warning that `what` has failed."""
        try:
            yield
        except Exception as error:
            if what not in self.reasons:
                self.reasons[what] = one_line(f"{type(error).__name__}: {error}", 500)
                with suppress(OSError):  # the console itself may have failed
                    print(
                        f"warning: {what} failed, training goes on ({self.reasons[what]})",
                        flush=True,
                    )


def write_status(out: Path, state: str, step: int, epoch: float, message: str = "") -> None:
    """Replace status.json; state is running, finished, preempted or failed."""
    status = {
        "state": state,
        "step": step,
        "epoch": epoch,
        "message": message,
        "pid": os.getpid(),
        "host": platform.node(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    text, path = json.dumps(status, indent=1), out / "status.json"
    try:
        replace_file(path, text)
    except OSError as error:
        if error.errno != errno.ENOSPC or not path.is_file() or path.is_symlink():
            raise
        # The disk is too full for a second file, so the existing one is overwritten.
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()


def describe_run(out: Path, facts: dict[str, Any], step: int) -> None:
    """Write run.json: `facts`, versions, commit and command; earlier starts are kept.

    Args:
        step: optimizer step from which this start trains.
    """
    path = out / "run.json"
    starts = _read_starts(path)
    here = {
        **facts,
        "command": [sys.executable, *sys.argv],
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {
            "cifar_dist": __version__,
            **{name: version(name) for name in ("torch", "torchvision", "accelerate")},
        },
        "commit": _git_commit(),
    }
    starts.append(
        {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "step": step,
            "world_size": facts["world_size"],
        }
    )
    replace_file(path, json.dumps({**here, "starts": starts}, indent=1))


def _read_starts(path: Path) -> list[Any]:
    """Return the earlier starts in run.json; warn and return none if it is damaged."""
    try:
        starts = json.loads(path.read_bytes())["starts"]
        if not isinstance(starts, list):
            raise TypeError("starts is not a list")
        return starts
    except FileNotFoundError:
        return []
    except (PermissionError, ValueError, LookupError, TypeError, RecursionError) as error:
        print(
            f"warning: '{path}' is damaged ({error!r}); it is written again, without the starts "
            "before this one",
            flush=True,
        )
        return []


class MetricsLog:
    """Writes metrics.jsonl. A resumed run drops the lines after its checkpoint.

    Args:
        out: run folder.
        step, epoch: steps and epochs done at the checkpoint; the last epoch may be trained but not
            yet evaluated.
        warned: a log that cannot be written causes a warning and does not end the run.
    """

    def __init__(self, out: Path, step: int, epoch: float, warned: Warned) -> None:
        self.path, self.warned = out / "metrics.jsonl", warned
        with warned.spare("metrics.jsonl"):
            lines = self._read_earlier() if step else []
            kept = [
                line
                for line in lines
                if line["step"] <= step
                and (line["epoch"] < epoch + 1 or line["split"] in ("train_window", "notice"))
            ]
            replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._noticed = len(warned.reasons)

    def _read_earlier(self) -> list[dict[str, Any]]:
        """Return the valid lines, and warn if there are damaged ones."""
        try:
            lines, damaged = _parse_metrics(self.path)
        except FileNotFoundError:
            return []
        except PermissionError as error:
            print(f"warning: '{self.path}' cannot be read ({error.strerror}); it begins again")
            return []
        if any(line["epoch"] == 0 for line in lines):  # an earlier version counted from 0
            lines = [{**line, "epoch": line["epoch"] + 1} for line in lines]
        if damaged:
            print(f"warning: '{self.path}': {damaged} damaged lines are left out", flush=True)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, after a notice for each failure since the previous line."""
        place = {"split": "notice", "epoch": line["epoch"], "step": line["step"]}
        lines = [
            {**place, "message": f"{what} failed: {reason}"}
            for what, reason in list(self.warned.reasons.items())[self._noticed :]
        ]
        text = "".join(json.dumps(entry) + "\n" for entry in (*lines, line))
        with self.warned.spare("metrics.jsonl"), self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(text.encode()) < len(text.encode()):  # the disk is full: no half lines
                file.truncate(end)
                raise OSError(errno.ENOSPC, "no room for a whole line")
            self._noticed += len(lines)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without damaged ones.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    return _parse_metrics(out / "metrics.jsonl")[0]


def _parse_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the valid lines and the number of damaged ones.

    A last line that a kill has truncated does not count as damaged.
    """
    lines, damaged = [], 0
    for text in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(text)
            if not all(type(line[key]) is kind for key, kind in LINE.items()):
                raise ValueError("not a line of metrics.jsonl")
            lines.append(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged += text.endswith(b"\n") or not text.startswith(b"{")
    return lines, damaged


def _git_commit() -> str | None:
    """Return the Git commit of this package, marked "-dirty" if it has changes, or None."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
