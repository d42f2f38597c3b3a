"""Preempt real runs in every phase: `python -m tests.faults.preempt [--only TEXT]`.

Each signal x each phase x launcher or one rank x one and two processes: 60 runs under a launcher.
Prints a table: the seconds until the last process exited, and whether the resumed run finished with
the weights of an uninterrupted run.
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from cifar_dist.storage.checkpoint import load_newest
from tests.forked import start
from tests.helpers import command, digest_of, write_folder

RECIPE = [
    *("--config", "smoke", "--data.name", "imagefolder", "--data.image_size", "16"),
    *("--model.name", "tutorial-relu", "--augment.flip", "random", "--augment.translate", "2"),
    *("--train.batch_size", "16", "--train.epochs", "3", "--checkpoint.every_steps", "4"),
    *("--track.log_with", "[]", "--track.every_steps", "1"),
]
PHASES = {
    "training": "slow_steps 0.1",
    "evaluating": "slow_evaluation 0.3",
    "saving": "slow_saving 0.5",
    "decoding": "slow_decoding 0.1",
    "starting": "slow_start 8",
}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TARGETS = ("launcher", "one rank")


@dataclass(frozen=True)
class Outcome:
    """The result of a preemption.

    Attributes:
        seconds: from the signal until the last process exited.
        state, step: from status.json.
        verified: step of the newest intact checkpoint.
        same: whether the resumed run finished with the weights of the uninterrupted run.
    """

    seconds: float
    state: str
    step: int
    verified: int
    same: bool


def preempt(
    number: signal.Signals, phase: str, target: str, processes: int, folder: Path, again: bool
) -> Outcome:
    """Start a run, send a signal in a phase, resume the run, and compare the weights.

    Args:
        folder: shared by all calls, for the images and the uninterrupted runs.
        again: whether to send the signal again after 0.2 s.
    """
    root = folder / "images"
    if not root.exists():
        write_folder(root, {"train": 96, "test": 42})
    options = [*RECIPE, "--data.root", str(root)]
    common = ["--data.cache", str(folder / "cache")]
    whole = folder / f"whole-{processes}"
    if not whole.exists():
        _finish([*options, *common, "--out", str(whole)], processes, folder)
    out = Path(tempfile.mkdtemp(prefix=f"{phase}-", dir=folder))
    if phase in ("decoding", "starting"):  # first make a checkpoint to resume from
        with start(
            [*options, *common, "--out", str(out)], processes, folder=folder, fault="raises 6 0"
        ) as job:
            job.wait()
        common = ["--data.cache", str(out / "cache")]  # an empty cache
    options += [*common, "--out", str(out)]
    seconds = _disturb(options, out, number, phase, target, processes, again)
    status = json.loads((out / "status.json").read_text())
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    _finish(options, processes, folder)
    return Outcome(
        seconds,
        status["state"],
        status["step"],
        newest[1].progress.step,
        digest_of(out) == digest_of(whole),
    )


def _disturb(
    options: list[str],
    out: Path,
    number: signal.Signals,
    phase: str,
    target: str,
    processes: int,
    again: bool,
) -> float:
    mark = out / "mark"
    launch = [*command(processes, "accelerate", "tests.faults.inject"), PHASES[phase], *options]
    environment = {**os.environ, "FAULT_MARK": str(mark), "PYTHONUNBUFFERED": "1"}
    with (out / "log.txt").open("w") as log:
        launcher = subprocess.Popen(launch, stdout=log, stderr=log, env=environment)
    try:
        deadline = time.monotonic() + 90
        while not mark.exists():
            assert launcher.poll() is None, (out / "log.txt").read_text()
            assert time.monotonic() < deadline, "the phase was not reached"
            time.sleep(0.005)
        everyone = _of_run(out)
        chosen = launcher.pid
        if target == "one rank":
            last = str(processes - 1)
            ranks = [p for p in everyone if p.pid != launcher.pid and _rank_of(p) == last]
            chosen = ranks[-1].pid
        began = time.monotonic()
        os.kill(chosen, number)
        if again:
            time.sleep(0.2)
            if psutil.pid_exists(chosen):
                os.kill(chosen, number)
        launcher.wait(timeout=60)
        while _of_run(out):
            assert time.monotonic() < began + 60, "processes were left behind"
            time.sleep(0.02)
        return time.monotonic() - began
    finally:
        for process in _of_run(out):
            process.kill()
        launcher.wait()


def _of_run(out: Path) -> list[psutil.Process]:
    """Return the live processes with this run folder on their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _rank_of(process: psutil.Process) -> str:
    return process.environ().get("RANK", "0")


def _finish(options: list[str], processes: int, folder: Path) -> None:
    with start(options, processes, folder=folder) as job:
        assert job.wait() == [0] * processes, job.text()


def main() -> int:
    """Run all preemptions, print the table, and return 0 if every run resumed correctly."""
    parser = argparse.ArgumentParser("tests.faults.preempt")
    parser.add_argument("--only", default="", help="rows that contain this text")
    only = parser.parse_args().only
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    print("| signal | phase | to | processes | status | step | seconds | same weights |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    worst, wrong, count = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        for processes, phase, target, number in itertools.product((1, 2), PHASES, TARGETS, SIGNALS):
            row = f"| {number.name} | {phase} | {target} | {processes} |"
            if only not in row:
                continue
            found = preempt(number, phase, target, processes, Path(name), again=count % 2 == 1)
            good = found.state == "preempted" and found.step == found.verified and found.same
            print(
                f"{row} {found.state} | {found.step} | {found.seconds:.1f} | "
                f"{'yes' if good else 'NO'} |",
                flush=True,
            )
            worst, wrong, count = max(worst, found.seconds), wrong + (not good), count + 1
    print(f"\n{count} preemptions, {wrong} failed, the slowest took {worst:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
