"""Name what is on images: `python -m cifar_dist.predict --checkpoint RUN_OR_STEP IMAGE...`.

Any image file that Pillow reads will do; class names and preprocessing come from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_dist.config import UsageError, require
from cifar_dist.runtime import run_verb

BATCH = 256  # images decoded and classified at a time


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, predict, print, and return the exit code."""

    def verb(arguments: Sequence[str]) -> int:
        parser = argparse.ArgumentParser("cifar_dist.predict", allow_abbrev=False)
        parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
        parser.add_argument(
            "--checkpoint", required=True, help="run folder (its newest) or one checkpoint's folder"
        )
        parser.add_argument("--best", action="store_true", help="of a run: the best by validation")
        parser.add_argument("--top", type=int, default=3, help="how many classes to name")
        parser.add_argument("--json", action="store_true", help="one JSON object a line")
        options = parser.parse_args(list(arguments))
        predictions = predict(options.checkpoint, options.images, options.top, options.best)
        for prediction in predictions:
            print(json.dumps(prediction) if options.json else _row(prediction), flush=True)
        return 0

    return run_verb(verb, argv)


def predict(
    place: str, images: Sequence[str | Path], top: int = 3, best: bool = False
) -> list[dict[str, Any]]:
    """Classify image files.

    Args:
        place: a run folder or one checkpoint's folder.
        images: files, and folders that are searched for image files.
        top: how many classes to name for each.
        best: of a run folder, the best checkpoint by validation instead of the newest.

    Returns:
        For each file: {"image": path, "classes": [{"class": name, "probability": p}, ...]}, the
        most probable class first.

    Raises:
        UsageError: no such checkpoint or file, or a file that is no image.
    """
    import numpy as np
    import torch

    from cifar_dist.checkpoint import find_checkpoint
    from cifar_dist.data.augment import normalise
    from cifar_dist.data.decode import decode_image
    from cifar_dist.evaluate import restore_network

    require(top >= 1, f"--top is {top}; give 1 or more")
    files = _find_files(images)
    checkpoint = find_checkpoint(place, best)[1]
    state = checkpoint.state
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    network = restore_network(checkpoint).to(device)
    predictions = []
    for start in range(0, len(files), BATCH):
        decoded = []
        for file in files[start : start + BATCH]:
            try:
                decoded.append(decode_image(file, state["image_size"]))
            except ValueError as error:
                raise UsageError(f"'{file}' is not an image that can be read: {error}") from error
        pixels = torch.from_numpy(np.stack(decoded)).to(device)
        with torch.inference_mode():
            logits = network(normalise(pixels, state["mean"], state["std"]))
            likely = logits.float().softmax(dim=1).topk(min(top, len(state["classes"])))
        for file, values, labels in zip(
            files[start : start + BATCH],
            likely.values.tolist(),
            likely.indices.tolist(),
            strict=True,
        ):
            classes = [
                {"class": state["classes"][label], "probability": value}
                for label, value in zip(labels, values, strict=True)
            ]
            predictions.append({"image": str(file), "classes": classes})
    return predictions


def _find_files(images: Sequence[str | Path]) -> list[Path]:
    from cifar_dist.listing import list_images

    files: list[Path] = []
    for place in map(Path, images):
        require(place.exists(), f"'{place}' does not exist; name image files or folders of them")
        if place.is_dir():
            found = list_images(place)
            require(bool(found), f"the folder '{place}' holds no image file")
            files += found
        else:
            files.append(place)
    return files


def _row(prediction: dict[str, Any]) -> str:
    classes = (f"{entry['class']} {entry['probability']:.3f}" for entry in prediction["classes"])
    return f"{prediction['image']}: {', '.join(classes)}"


if __name__ == "__main__":
    sys.exit(main())
