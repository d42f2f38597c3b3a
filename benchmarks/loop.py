"""Compare training loops of several libraries on the same network and batch: images per second.

`python -m benchmarks.loop [--model NAME] [--batch N] [--rounds N] [--root FOLDER]`
"""

import argparse
from pathlib import Path

from benchmarks.data import add_options, load, same_places
from benchmarks.harness import RESULTS, Subject, measure, median, paired, record, spread, table
from benchmarks.peers import ON_GPU

OURS = "cifar-dist"
# Row, subject, lean.
ROWS = [
    ("bare arithmetic", "bare", False),
    ("bare arithmetic, memory kept", "bare-kept", False),
    (OURS, "cifar-dist", False),
    ("cifar-dist, compiled", "cifar-dist-compiled", False),
    ("tutorials' loop", "tutorials", False),
    ("tutorials' loop, channels_last", "tutorials", True),
    ("Accelerate as documented", "accelerate", False),
    ("Accelerate, channels_last", "accelerate", True),
    ("Lightning", "lightning", False),
    ("Lightning, all off, channels_last", "lightning", True),
    ("timm", "timm", False),
    ("timm, channels_last", "timm", True),
    ("airbench's loader and loop, channels_last", "airbench", True),
    ("ceilings", "ceilings", False),
]


def main() -> None:
    """Measure, and write results/loop-MODEL-BATCH, or loop-MODEL-BATCH-gpu, as .md and .json."""
    parser = argparse.ArgumentParser("benchmarks.loop", description=__doc__)
    parser.add_argument("--model", default="tutorial")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=0, help="per round; default: about 2 seconds")
    parser.add_argument(
        "--only", nargs="+", metavar="SUBJECT", help="in addition to bare arithmetic"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    add_options(parser)
    options = parser.parse_args()
    load(options)  # decode the images before measuring
    steps = options.steps or max(2, (4096 if options.model == "tutorial" else 64) // options.batch)
    warmup = 3 if options.model != "tutorial" else 20
    subjects = [
        Subject(
            row,
            [
                *("-m", "benchmarks.peers", name, "--model", options.model),
                *(
                    "--batch",
                    str(options.batch),
                    *same_places(options),
                    *(["--lean"] if lean else []),
                ),
                *("--steps", str(steps if name != "ceilings" else 1)),
                *("--warmup", str(warmup if name != "ceilings" else 1)),
            ],
        )
        for row, name, lean in ROWS
        if not options.only or name == "bare" or name in options.only
    ]
    rounds = measure(subjects, options.rounds)
    rows = []
    for subject in subjects:
        if subject.name == "ceilings":
            continue
        images = options.batch * steps
        rows.append(
            [
                subject.name,
                f"{images / median(rounds, subject.name, 'wall'):.0f}",
                spread(paired(rounds, subject.name, "bare arithmetic")),
                spread(paired(rounds, OURS, subject.name)) if OURS in rounds else "",
                f"{1e3 * median(rounds, subject.name, 'cpu') / images:.3f}",
                f"{median(rounds, subject.name, 'peak_mb'):.0f}",
            ]
        )
    notes = ""
    if "ceilings" in rounds:
        keys = ("product", "convolution", "training")
        figures = {key: median(rounds, "ceilings", f"{key}_gflops") for key in keys}
        copy = median(rounds, "ceilings", "copy_gbs")
        notes = (
            f"Ceilings in the same rounds: matrix product {figures['product']:.0f} GFLOP/s; 3x3 "
            f"convolution of 64 channels, forward {figures['convolution']:.0f}, with its backward "
            f"pass {figures['training']:.0f}; memory copy {copy:.1f} GB/s (read and written)."
        )
    head = ["loop", "images/s", "relative to bare arithmetic", f"{OURS} relative to this"]
    record(
        options.results,
        f"loop-{options.model}-{options.batch}{'-gpu' if ON_GPU else ''}",
        f"{options.model} at batch {options.batch}, {options.rounds} rounds of {steps} steps",
        table([*head, "CPU ms per image", "peak MB"], rows),
        {"batch": options.batch, "steps": steps, "rounds": rounds},
        notes,
    )


if __name__ == "__main__":
    main()
