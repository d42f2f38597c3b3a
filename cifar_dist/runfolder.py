"""The run folder: what a run leaves on disk besides its checkpoints, each file whole or absent.

recipe.yaml is the resolved recipe, run.json where and with what it ran, status.json how it stands,
metrics.jsonl one JSON object a line. Only rank 0 writes.
"""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cifar_dist import __version__
from cifar_dist.config import Recipe, UsageError, differences, dump_recipe, load_recipe


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_out(recipe: Recipe) -> None:
    """Refuse a run folder that holds something else than this recipe's run.

    Raises:
        UsageError: naming the keys that differ.
    """
    out = Path(recipe.out or "").expanduser()
    if not recipe.out or not (out / "recipe.yaml").is_file():
        return
    if recipe.resume != "auto":
        raise UsageError(
            f"'{out}' already holds a run; name another folder with --out, or continue that run "
            "with --resume auto"
        )
    found = differences(load_recipe(out / "recipe.yaml"), recipe)
    if found:
        raise UsageError(
            f"'{out}' holds a run of another recipe ({'; '.join(found)}); name another folder with "
            "--out, or use the same recipe to continue"
        )


def claim(recipe: Recipe) -> Path:
    """Find or make the run folder, write recipe.yaml into it and return its path.

    Raises:
        UsageError: it cannot be written.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(recipe.out or f"runs/{recipe.name}-{stamp}").expanduser()
    while not recipe.out and out.exists():  # another run started in this second
        out = out.with_name(f"{out.name}-again")
    try:
        out.mkdir(parents=True, exist_ok=bool(recipe.out))
        replace_file(out / "recipe.yaml", dump_recipe(recipe))
    except OSError as error:
        raise UsageError(
            f"the run folder '{out}' cannot be used ({error.strerror}); name another with --out"
        ) from error
    return out


def write_status(out: Path, state: str, step: int, epoch: int, message: str = "") -> None:
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
    replace_file(out / "status.json", json.dumps(status, indent=1))


def describe_run(out: Path, facts: dict[str, Any], step: int) -> None:
    """Write run.json: the facts given, versions, commit and command; earlier starts are kept."""
    path = out / "run.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
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


class MetricsLog:
    """metrics.jsonl, continued at `step`: lines of later steps, written before a stop, go."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        kept = [line for line in read_metrics(out) if line["step"] <= step] if step else []
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last line cut short by a kill is left out."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _git_commit() -> str | None:
    """Return the commit of the checkout the package runs from, marked if it has changes."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
