"""The benchmarks' commands, with settings too small to say anything."""

import json
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
    assert "A step sends 0.580 MB in 2.0 all-reduces" in text  # 145,123 weights, and a flag
    for row in ("two runs of batch 8", "the same of 8, in step", "two processes, batch 16"):
        assert f"| {row} | " in text


@pytest.mark.slow
def test_the_benchmark_of_time_to_accuracy_runs(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 1200, "test": 60})
    options = ["--root", str(root), "--rounds", "1", "--epochs", "1"]
    text = table_of("time_to_accuracy", tmp_path, options, "time-to-accuracy")
    for row in ("the tutorials' script", "quick"):
        assert f"| {row} | 0." in text


@pytest.mark.slow
def test_the_muon_benchmark_runs(tmp_path: Path) -> None:
    text = table_of("muon", tmp_path, ["--rounds", "1"])
    assert "| on Gram matrices | " in text


# What benchmarks.record expects of airbench's script, with a linear model in it.
STAND_IN = """
import importlib
import os
from math import ceil

import torch
from torch import nn

@torch.compile
def unused(gradient):
    return gradient.bfloat16()

def load(split):
    path = os.path.join("cifar10", split + ".pt")
    data = torch.load(path, map_location=torch.device("cuda"))
    return data["images"].half() / 255, data["labels"]

class CifarNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3072, 10))

def print_training_details(variables, is_final_entry):
    raise NotImplementedError

def main(run, model):
    assert importlib.import_module(__name__).CifarNet is CifarNet  # torch.compile does so
    starter = torch.cuda.Event(enable_timing=True)
    ender = torch.cuda.Event(enable_timing=True)
    images, labels = load("train")
    total_train_steps = ceil(8 * 2)
    starter.record()
    for step in range(total_train_steps):
        nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    ender.record()
    torch.cuda.synchronize()
    time_seconds = starter.elapsed_time(ender)
    images, labels = load("test")
    val_acc = tta_val_acc = (model(images).argmax(1) == labels).float().mean().item()
    print_training_details(locals(), is_final_entry=True)

if __name__ == "__main__":
    model = CifarNet().cuda()
    model.compile(mode="max-autotune")
"""


@pytest.mark.slow
def test_the_benchmark_of_the_record_runs(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", {"train": 2100, "test": 60})
    (tmp_path / "airbench94_muon.py").write_text(STAND_IN)
    options = ["--airbench", str(tmp_path / "airbench94_muon.py"), "--runs", "1", "--epochs", "1"]
    options += ["--root", str(root), "--cache", f"{tmp_path}/cache"]
    text = table_of("record", tmp_path, options, "record-cpu")
    rounds = json.loads((tmp_path / "record-cpu.json").read_text())["results"]["rounds"]
    for row in ("cifar-dist, cifar10-94", "airbench94, Muon"):
        assert f"| {row} | " in text
        assert 0 < rounds[row][0]["train_cpu"] < rounds[row][0]["cpu"] + 1
        assert 0 <= rounds[row][0]["plain"] <= 1


@pytest.mark.slow
def test_another_version_of_that_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "airbench94_muon.py").write_text("import torch")
    command = ["-m", "benchmarks.record", "--airbench", str(tmp_path / "airbench94_muon.py")]
    root = write_folder(tmp_path / "set", {"train": 30, "test": 30})
    options = ["--root", str(root), "--cache", f"{tmp_path}/cache"]
    done = run_command([sys.executable, *command, *options, "--runs", "1"])
    assert done.returncode != 0
    assert "it may be another version" in done.stderr


def table_of(module: str, results: Path, options: list[str], name: str = "") -> str:
    """Run a benchmark and return what it wrote."""
    name = name or module
    command = [sys.executable, "-m", f"benchmarks.{module}", "--results", str(results), *options]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert (results / f"{name}.json").is_file()
    return (results / f"{name}.md").read_text()
