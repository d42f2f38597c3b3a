"""Kill real runs and compare their results: `python -m tests.faults.campaign --kills N`.

All processes of a run are killed with SIGKILL at once: half of the times before the n-th write
operation of a save, for every n, otherwise at a random moment. Each run is restarted and killed
again until it finishes. Then its weights are compared with those of an uninterrupted run. After
every kill the newest checkpoint must verify, and its step must not decrease.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from cifar_dist.errors import UsageError
from cifar_dist.storage.checkpoint import DamagedCheckpoint, checkpoints_in, load_checkpoint
from tests.forked import start
from tests.helpers import TINY, digest_of

# All random features are on, and saves are frequent.
RECIPE = [
    *(*TINY, "--data.image_size", "16", "--model.name", "tutorial-relu"),
    *("--augment.flip", "random", "--augment.translate", "1", "--augment.cutout", "4"),
    *("--optim.momentum", "0.9", "--train.ema", "0.9", "--train.epochs", "3"),
    *("--train.batch_size", "30"),  # for 1, 2 and 3 processes
    *("--checkpoint.every_steps", "3", "--checkpoint.keep", "2"),
]
WRITES = 24  # approximate write operations of one save; the kills cycle through them


@dataclass
class Tally:
    """Counts and failures of a campaign.

    Attributes:
        kills: total number of kills.
        in_save: kills before a write operation of a save.
        finished: runs that finished.
        wrong: messages about violated guarantees.
    """

    kills: int = 0
    in_save: int = 0
    finished: int = 0
    wrong: list[str] = field(default_factory=list)


def kill_runs(processes: int, kills: int, folder: Path, seed: int = 0) -> Tally:
    """Kill runs until there were `kills` kills."""
    chance, tally, options = random.Random(seed), Tally(), [*RECIPE, "--out"]
    whole = folder / f"whole-{processes}"
    with start([*options, str(whole)], processes, folder=folder) as job:
        began = time.monotonic()
        assert job.wait() == [0] * processes, job.text()
        length = time.monotonic() - began
    expected, runs = digest_of(whole), 0
    while tally.kills < kills:
        runs += 1
        out, reached = folder / f"run-{processes}-{runs}", 0
        for attempt in range(1000):
            at_write = attempt % 2 == 0 and tally.kills < kills
            number = tally.in_save % WRITES + 1
            mark = folder / f"mark-{processes}-{tally.kills}"
            with start(
                [*options, str(out)],
                processes,
                folder=folder,
                fault=f"dies_at_write {number}" if at_write else "",
                FAULT_MARK=str(mark),
            ) as job:
                if tally.kills < kills:
                    job.wait(60 if at_write else chance.uniform(0.2, 1.2) * length)
                    job.kill()
                codes = job.wait()
            if codes == [0] * processes:
                break
            if not all(code in (0, -9) for code in codes):
                tally.wrong.append(f"run {runs} could not resume: {job.text()}")
                break
            tally.kills += 1
            tally.in_save += mark.exists()
            reached = _look(out, reached, tally)
        tally.finished += 1
        if digest_of(out) != expected:
            tally.wrong.append(f"run {runs} finished with different weights")
    return tally


def _look(out: Path, reached: int, tally: Tally) -> int:
    """Verify the checkpoints after a kill, and return the newest step."""
    steps = []
    for path in checkpoints_in(out / "checkpoints") if (out / "checkpoints").is_dir() else []:
        try:
            steps.append(load_checkpoint(path).progress.step)
        except (DamagedCheckpoint, UsageError) as error:
            tally.wrong.append(f"a committed checkpoint is damaged: {error}")
    newest = max(steps, default=0)
    if newest < reached:
        tally.wrong.append(f"step {reached} was committed, but now the newest is {newest}")
    return newest


def main() -> int:
    """Run the campaign on one and on two processes, and return 0 if nothing failed."""
    parser = argparse.ArgumentParser("tests.faults.campaign")
    parser.add_argument("--kills", type=int, default=300, help="for each number of processes")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    wrong = 0
    for processes in options.processes:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            tally = kill_runs(processes, options.kills, Path(name), options.seed)
        minutes = (time.monotonic() - began) / 60
        print(
            f"{processes} processes: {tally.kills} kills, {tally.in_save} of them inside a save, "
            f"{tally.finished} runs finished, {len(tally.wrong)} failures, {minutes:.0f} minutes",
            *tally.wrong,
            sep="\n  ",
            flush=True,
        )
        wrong += len(tally.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
