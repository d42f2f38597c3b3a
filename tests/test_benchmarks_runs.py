"""The benchmarks' commands, with settings too small to say anything."""

import sys
from pathlib import Path

import pytest

from tests.helpers import run_command, write_folder


@pytest.mark.slow
def test_the_growth_benchmark_runs(tmp_path: Path) -> None:
    options = ["--images", "64", "640", "--batch", "32", "--rounds", "1"]
    text = table_of("growth", tmp_path, options)
    for row in ("64 images", "640 images", "64 images of 64 pixels", "speednet", "twice as wide"):
        assert f"{row} |" in text


@pytest.mark.slow
def test_the_start_up_benchmark_runs(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 200, "test": 20})
    options = ["--root", str(root), "--cache", f"{tmp_path}/cache", "--rounds", "1"]
    text = table_of("startup", tmp_path, [*options, "--steps", "2"])
    for row in ("python -c 'import torch'", "first step", "first step under accelerate launch"):
        assert f"| {row} | " in text
    assert "| python -m cifar_dist.train --help | no | no | no | no | no | no |" in text


@pytest.mark.slow
def test_the_scaling_benchmark_runs(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 200, "test": 20})
    options = ["--root", str(root), "--cache", f"{tmp_path}/cache", "--rounds", "1"]
    options += ["--model", "tutorial", "--batch", "16", "--steps", "3"]
    text = table_of("scaling", tmp_path, options, "scaling-tutorial-16")
    assert "A step sends 0.582 MB in " in text  # 145,578 weights, and a flag
    for row in ("two runs of batch 8", "the same of 8, in step", "two processes, batch 16"):
        assert f"| {row} | " in text


@pytest.mark.slow
def test_the_benchmark_of_time_to_accuracy_runs(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 1200, "test": 60})
    options = ["--root", str(root), "--rounds", "1", "--epochs", "1"]
    text = table_of("time_to_accuracy", tmp_path, options, "time-to-accuracy")
    for row in ("the tutorials' script", "quick"):
        assert f"| {row} | 0." in text


def table_of(module: str, results: Path, options: list[str], name: str = "") -> str:
    """Run a benchmark and return what it wrote."""
    name = name or module
    command = [sys.executable, "-m", f"benchmarks.{module}", "--results", str(results), *options]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert (results / f"{name}.json").is_file()
    return (results / f"{name}.md").read_text()
