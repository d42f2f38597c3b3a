"""The harness: rounds in turn, ratios of neighbours, and a subject that fails."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harness import Subject, measure, paired, spread
from tests.helpers import write_folder

WORKER = (
    "import sys, time; from benchmarks.harness import Meter\n"
    "meter = Meter(steps=3, warmup=2)\n"
    "print('noise')\n"
    "while True:\n"
    "    time.sleep(float(sys.argv[1])); meter.tick(found=7)"
)

PROCESSES = (
    "import os, sys, torch; from benchmarks.harness import Meter\n"
    "torch.distributed.init_process_group('gloo')\n"
    "meter = Meter(steps=3, warmup=2)\n"
    "for _ in range(100):\n"
    "    open(sys.argv[1], 'a').write(os.environ['RANK']); meter.tick()"
)


def test_subjects_take_turns_and_ratios_are_of_one_round() -> None:
    subjects = [
        Subject(name, ["-c", WORKER, pause]) for name, pause in [("a", ".01"), ("b", ".03")]
    ]
    rounds = measure(subjects, 2)
    assert {name: len(reports) for name, reports in rounds.items()} == {"a": 2, "b": 2}
    assert all(report["found"] == 7 and report["peak_mb"] > 0 for report in rounds["a"])
    assert all(0.03 <= report["wall"] < 0.09 <= rounds["b"][0]["wall"] for report in rounds["a"])
    assert all(1.5 < ratio < 3.5 for ratio in paired(rounds, "a", "b"))


@pytest.mark.slow
def test_no_process_of_a_subject_runs_ahead_between_rounds(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(PROCESSES)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    steps = tmp_path / "steps"
    subject = Subject("two", [*launch, str(tmp_path / "worker.py"), str(steps)])
    try:
        for count, advance in [(2, subject.prepare), (5, subject.go)]:
            advance()
            time.sleep(1)  # for the second to get as far as it can
            assert sorted(steps.read_text()) == ["0"] * count + ["1"] * count
    finally:
        subject.stop()


def test_a_subject_that_ends_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="the subject 'broken' exited with code 1"):
        measure([Subject("broken", ["-c", "raise ValueError('its own words')"])], 1)
    assert "its own words" in capfd.readouterr().err


def test_spread() -> None:
    assert spread([1.0]) == "1.000"
    assert spread([1.0, 2.0], 1) == "1.5 (1.0 to 2.0)"  # no further than what was seen
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 (1.0 to 3.0)"


@pytest.mark.slow
def test_the_loop_benchmark_runs(tmp_path: Path) -> None:
    """With the subjects that need no further package."""
    root = write_folder(tmp_path / "set", {"train": 200, "test": 20})
    options = ["--root", str(root), "--cache", f"{tmp_path}/cache", "--rounds", "2"]
    options += ["--results", str(tmp_path)]
    only = ["--only", "cifar-dist", "tutorials", "accelerate", "ceilings"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loop", "--batch", "16", "--steps", "2", *options, *only],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "| cifar-dist |" in done.stdout
    assert "Accelerate, channels_last" in done.stdout
