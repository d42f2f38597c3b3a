"""Evaluate a checkpoint: `cifar-dist evaluate RUN`.

Counts every image exactly once at any world size, and prints a table or JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cifar_dist.command import Parser, command
from cifar_dist.config import DataConfig, parse_overrides
from cifar_dist.errors import require
from cifar_dist.processes.start import leave_processes

if TYPE_CHECKING:
    from cifar_dist.data.images import Images

MATRIX_CLASSES = 1000  # maximum number of classes for the confusion matrix in JSON
FIXED = ("data.image_size", "data.normalize")  # the network's preprocessing
TABLE_CLASSES = 20  # maximum number of classes for the confusion matrix in the table


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, evaluate, print, and return the exit code."""
    options, data = _parse(argv)
    from accelerate import PartialState

    result = evaluate_checkpoint(
        options.run, data, options.split, options.tta, options.best, options.model
    )
    if PartialState().is_main_process:
        print(json.dumps(result) if options.json else _table(result), flush=True)
    leave_processes()
    return 0


def evaluate_checkpoint(
    place: str,
    data: DataConfig | None = None,
    split: str | None = None,
    tta: str | None = None,
    best: bool = False,
    model: str | None = None,
) -> dict[str, Any]:
    """Evaluate the checkpoint at `place` and return plain values; every process must call it.

    Args:
        place: a run folder or the folder of one checkpoint.
        data: dataset; None is the dataset that the checkpoint was trained on.
        split: test, val or train; None is the first of these that exists.
        tta: test-time augmentation: none, flip or flip_shift; None is that of the recipe.
        best: from a run folder, use the best checkpoint by validation instead of the newest.
        model: the network's name, needed if it is code of the user's own.

    Returns:
        checkpoint, step, split, tta, accuracy, correct, count, loss, calibration_error, per_class
        (recall by class name; None without images) and confusion (rows are true classes). For more
        than MATRIX_CLASSES classes, confusion is replaced by confusion_pairs: a list of [true
        label, predicted label, images] without empty pairs.

    Raises:
        UsageError: no such checkpoint or dataset, or their classes differ.
    """
    from cifar_dist.data import load_evaluation
    from cifar_dist.data.augment import Pixels
    from cifar_dist.data.batches import build_evaluation_loader
    from cifar_dist.processes.start import on_main_process, start_processes
    from cifar_dist.speedups import speed_up
    from cifar_dist.storage.checkpoint import find_progress, find_weights
    from cifar_dist.storage.weights import restore_network
    from cifar_dist.training.engine import evaluate

    recipe = find_progress(place, best)[1].recipe
    accelerator, peers = start_processes(
        recipe.train, shared={"best": best, "split": split, "tta": tta}
    )
    # A run may be saving: rank 0 chooses the checkpoint and sends it to the others.
    path, (progress, weights) = on_main_process(accelerator, lambda: find_weights(place, best))
    recipe, classes = progress.recipe, progress.classes
    wanted = dataclasses.replace(data or recipe.data, image_size=progress.image_size)
    split, images = load_evaluation(wanted, split)
    _check_classes(images, classes)
    network, pixels = speed_up(
        restore_network(progress, weights, path, model).to(accelerator.device),
        Pixels(progress.mean, progress.std, recipe.augment, recipe.train.seed),
    )
    result = evaluate(
        accelerator,
        network,
        build_evaluation_loader(accelerator, images.relabelled(tuple(classes))),
        pixels,
        len(classes),
        tta or recipe.train.tta,
    )
    peers.leave()
    if len(classes) <= MATRIX_CLASSES:
        confusion = {"confusion": result.confusion.tolist()}
    else:
        confusion = {"confusion_pairs": result.pairs.tolist()}
    shares = [None if math.isnan(share) else share for share in result.per_class]
    return {
        "checkpoint": str(path),
        "step": progress.step,
        "split": split,
        "tta": tta or recipe.train.tta,
        "accuracy": result.totals.accuracy,
        "correct": result.totals.correct,
        "count": result.totals.count,
        "loss": result.totals.loss,
        "calibration_error": result.calibration_error,
        "per_class": dict(zip(classes, shares, strict=True)),
        **confusion,
    }


def _check_classes(images: Images, classes: Sequence[str]) -> None:
    """Refuse a dataset whose classes differ from those of the checkpoint, and name them."""
    missing, extra = set(classes) - set(images.classes), set(images.classes) - set(classes)
    parts = [
        f"{what}: {', '.join(sorted(which))}"
        for what, which in (("missing", missing), ("unknown to the checkpoint", extra))
        if which
    ]
    require(not parts, f"the dataset's classes are not the checkpoint's; {'; '.join(parts)}")


def _parse(argv: Sequence[str]) -> tuple[Any, DataConfig]:
    """Parse the options, and return them with the dataset to evaluate on.

    data.* defaults to the dataset of the checkpoint. If data.name or data.root is given, limits and
    val_fraction of the checkpoint's recipe are not used.
    """
    from cifar_dist.storage.checkpoint import find_progress

    parser = Parser("evaluate", __doc__, "--data.KEY VALUE, as of train, evaluates on other images")
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="run folder (its newest checkpoint) or a checkpoint"
    )
    parser.add_run_options()
    parser.add_argument(
        "--split", choices=("test", "val", "train"), help="default: the first that exists"
    )
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "flip_shift"),
        default="none",
        help="test-time augmentation: average over mirrored and shifted views of each image",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object; above 1000 classes it has confusion_pairs, a list of [true "
        "label, predicted label, images], instead of the confusion matrix",
    )
    given, rest = parse_overrides(argv, "data.")
    options = parser.read(rest)
    require(
        (options.run is None) != (options.checkpoint is None),
        "name one run: cifar-dist evaluate RUN",
    )
    options.run = options.run or options.checkpoint
    for key in FIXED:
        require(key not in given, f"--{key} is fixed by the checkpoint; remove it")
    data = find_progress(options.run)[1].recipe.data
    if {"data.name", "data.root"} & set(given):
        data = dataclasses.replace(data, val_fraction=0.0, limit_train=None, limit_test=None)
    values = {key.removeprefix("data."): value for key, value in given.items()}
    return options, dataclasses.replace(data, **values)


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"checkpoint {result['checkpoint']}, step {result['step']}, {result['split']} images, "
        f"views {result['tta']}",
        f"accuracy {result['accuracy']:.4f} ({result['correct']}/{result['count']})  "
        f"loss {result['loss']:.4f}  calibration error {result['calibration_error']:.4f}",
        "",
    ]
    names = list(result["per_class"])
    width = max(map(len, names))
    matrix = result["confusion"] if len(names) <= TABLE_CLASSES else [[]] * len(names)
    cell = max(5, len(str(max(max(row, default=0) for row in matrix))) + 1)
    heading = "   taken for (columns in the same order)" if matrix[0] else ""
    lines += [f"{'class':{width}}  accuracy{heading}"]
    for name, row in zip(names, matrix, strict=True):
        share = result["per_class"][name]
        shown = "       -" if share is None else f"{share:8.4f}"
        lines += [f"{name:{width}}  {shown}  {''.join(f'{number:{cell}}' for number in row)}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
