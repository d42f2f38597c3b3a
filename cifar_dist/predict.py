"""Classify images: `python -m cifar_dist.predict --checkpoint RUN_OR_STEP IMAGE...`.

Reads all image formats of Pillow. Class names and preprocessing come from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_dist.command import run_verb
from cifar_dist.errors import UsageError, require

BATCH = 256  # images decoded and classified at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, predict, print, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        parser = argparse.ArgumentParser("cifar_dist.predict", allow_abbrev=False)
        parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
        parser.add_argument(
            "--checkpoint", required=True, help="run folder (its newest checkpoint) or a checkpoint"
        )
        parser.add_argument(
            "--best", action="store_true", help="use the best checkpoint of a run by validation"
        )
        parser.add_argument("--top", type=int, default=3, help="number of classes per image")
        parser.add_argument("--json", action="store_true", help="print one JSON object per line")
        parser.add_argument(
            "--bad-images",
            choices=("skip", "stop"),
            default="skip",
            help="if an image cannot be decoded: skip it, report it and exit with code 1 at the "
            "end, or stop at the first one before any result is printed",
        )
        options = parser.parse_args(list(arguments))
        run = predict if options.bad_images == "stop" else stream_predictions
        code = 0
        for result in run(options.checkpoint, options.images, options.top, options.best):
            if "error" in result:
                print(f"error: {_refusal(result)}", file=sys.stderr, flush=True)
                code = 1
            else:
                print(json.dumps(result) if options.json else _row(result), flush=True)
        return code

    return run_verb(verb, argv)


def predict(
    place: str, images: Sequence[str | Path], top: int = 3, best: bool = False
) -> list[dict[str, Any]]:
    """Classify all image files, or raise. For the arguments see `stream_predictions`.

    Returns:
        For each file: {"image": path, "classes": [{"class": name, "probability": p}, ...]}, the
        most probable class first.

    Raises:
        UsageError: no such checkpoint or file, or a file that cannot be decoded.
    """
    predictions = []
    for result in stream_predictions(place, images, top, best):
        if "error" in result:
            raise UsageError(_refusal(result))
        predictions.append(result)
    return predictions


def stream_predictions(
    place: str, images: Sequence[str | Path], top: int = 3, best: bool = False
) -> Iterator[dict[str, Any]]:
    """Classify image files in batches, and yield the results after each batch.

    Args:
        place: a run folder or the folder of one checkpoint.
        images: files, and folders that are searched for image files.
        top: number of classes per image.
        best: from a run folder, use the best checkpoint by validation instead of the newest.

    Yields:
        For each file the entry that `predict` returns. A file that cannot be decoded yields
        {"image": path, "error": reason} before the results of its batch.

    Raises:
        UsageError: no such checkpoint or file.
    """
    import numpy as np
    import torch

    from cifar_dist.data.augment import normalise
    from cifar_dist.data.decode import decode_image
    from cifar_dist.storage.checkpoint import find_weights
    from cifar_dist.storage.weights import restore_network

    require(top >= 1, f"--top is {top}; give 1 or more")
    files = _find_files(images)
    progress, weights = find_weights(place, best)[1]
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    network = restore_network(progress, weights).to(device)
    for start in range(0, len(files), BATCH):
        names, decoded = [], []
        for file in files[start : start + BATCH]:
            try:
                decoded.append(decode_image(file, progress.image_size))
                names.append(str(file))
            except ValueError as error:
                yield {"image": str(file), "error": str(error)}
        if not decoded:
            continue
        pixels = torch.from_numpy(np.stack(decoded)).to(device)
        with torch.inference_mode():
            logits = network(normalise(pixels, progress.mean, progress.std))
            likely = logits.float().softmax(dim=1).topk(min(top, len(progress.classes)))
        for name, values, labels in zip(
            names, likely.values.tolist(), likely.indices.tolist(), strict=True
        ):
            classes = [
                {"class": progress.classes[label], "probability": value}
                for label, value in zip(labels, values, strict=True)
            ]
            yield {"image": name, "classes": classes}


def _find_files(images: Sequence[str | Path]) -> list[Path]:
    from cifar_dist.data.listing import list_images

    files: list[Path] = []
    for place in map(Path, images):
        require(
            os.path.exists(place), f"'{place}' does not exist; name image files or folders of them"
        )
        if place.is_dir():
            found = list_images(place)
            require(bool(found), f"the folder '{place}' holds no image file")
            files += found
        else:
            files.append(place)
    return files


def _refusal(result: dict[str, Any]) -> str:
    return f"'{result['image']}' is not an image that can be read: {result['error']}"


def _row(prediction: dict[str, Any]) -> str:
    classes = (f"{entry['class']} {entry['probability']:.3f}" for entry in prediction["classes"])
    return f"{prediction['image']}: {', '.join(classes)}"


if __name__ == "__main__":
    sys.exit(main())
