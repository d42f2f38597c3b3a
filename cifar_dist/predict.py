"""Classify images: `cifar-dist predict RUN IMAGE...`.

Reads all image formats of Pillow. Class names and preprocessing come from the checkpoint.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar_dist.command import Parser, command
from cifar_dist.errors import UsageError, require

if TYPE_CHECKING:
    from torch import nn

    from cifar_dist.data.augment import Pixels

PLACES = "run folder (its newest checkpoint) or a checkpoint, then image files or folders of them"
BATCH = 256  # images decoded and classified at a time


@command
def main(argv: Sequence[str]) -> int:
    """Parse the command line, predict, print, and return the exit code."""
    parser = Parser("predict", __doc__)
    parser.add_argument("places", nargs="+", metavar="RUN IMAGE", help=PLACES)
    parser.add_run_options()
    parser.add_argument("--top", type=int, default=3, help="number of classes per image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--bad-images",
        choices=("skip", "stop"),
        default="skip",
        help="if an image cannot be decoded: skip it, report it and exit with code 1 at the "
        "end, or stop at the first one before any result is printed",
    )
    options = parser.read(argv)
    place, *images = [options.checkpoint, *options.places][options.checkpoint is None :]
    require(bool(images), f"no images are named; use: cifar-dist predict {place} IMAGE ...")
    run = predict if options.bad_images == "stop" else stream_predictions
    code = 0
    for result in run(place, images, options.top, options.best, options.model):
        if "error" in result:
            print(f"error: {_refusal(result)}", file=sys.stderr, flush=True)
            code = 1
        else:
            print(json.dumps(result) if options.json else _row(result), flush=True)
    return code


def predict(
    place: str,
    images: Sequence[str | Path],
    top: int = 3,
    best: bool = False,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Classify all image files, or raise. For the arguments see `stream_predictions`.

    Returns:
        For each file: {"image": path, "classes": [{"class": name, "probability": p}, ...]}, the
        most probable class first.

    Raises:
        UsageError: no such checkpoint or file, or a file that cannot be decoded.
    """
    predictions = []
    for result in stream_predictions(place, images, top, best, model):
        if "error" in result:
            raise UsageError(_refusal(result))
        predictions.append(result)
    return predictions


def stream_predictions(
    place: str,
    images: Sequence[str | Path],
    top: int = 3,
    best: bool = False,
    model: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Classify image files in batches, and yield the results after each batch.

    Args:
        place: a run folder or the folder of one checkpoint.
        images: files, and folders that are searched for image files.
        top: number of classes per image.
        best: from a run folder, use the best checkpoint by validation instead of the newest.
        model: the network's name, needed if it is code of the user's own.

    Yields:
        For each file the entry that `predict` returns. A file that cannot be decoded yields
        {"image": path, "error": reason} before the results of its batch.

    Raises:
        UsageError: no such checkpoint or file.
    """
    from cifar_dist.data.decode import decode_image

    require(top >= 1, f"--top is {top}; give 1 or more")
    files = _find_files(images)
    classifier = load(place, best, model)
    for start in range(0, len(files), BATCH):
        names, decoded = [], []
        for file in files[start : start + BATCH]:
            try:
                decoded.append(decode_image(file, classifier.image_size))
                names.append(str(file))
            except ValueError as error:
                yield {"image": str(file), "error": str(error)}
        for name, prediction in zip(names, classifier.classify(decoded), strict=True):
            shown = list(prediction.probabilities.items())[:top]
            yield {"image": name, "classes": [{"class": c, "probability": p} for c, p in shown]}


@dataclass(frozen=True)
class Prediction:
    """The classes of one image.

    Attributes:
        name: the most probable class.
        probability: its probability.
        probabilities: of all classes, the most probable first.
    """

    name: str
    probability: float
    probabilities: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    """A trained network, ready to classify images.

    Attributes:
        network: maps normalised float [N, 3, S, S] to logits [N, classes]; in evaluation mode.
        classes: names, in the order of the logits.
        image_size: S, in pixels.
        pixels: normalises images.
        run: run folder.
    """

    network: nn.Module
    classes: list[str]
    image_size: int
    pixels: Pixels
    run: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the run's metrics.jsonl."""
        from cifar_dist.storage.folder import read_metrics

        return read_metrics(self.run)

    def predict(self, images: Any) -> Any:
        """Classify an image, or each of a list of images.

        Args:
            images: a path, a PIL image or a uint8 array [H, W, 3], or a list of them.

        Returns:
            A Prediction, or a list of them.

        Raises:
            UsageError: a file cannot be decoded, or an image is of another type.
        """
        if isinstance(images, (list, tuple)):
            decoded = [self._decode(image) for image in images]
            return [
                prediction
                for start in range(0, len(decoded), BATCH)
                for prediction in self.classify(decoded[start : start + BATCH])
            ]
        return self.classify([self._decode(images)])[0]

    def classify(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Classify images that have the network's size, each uint8 [S, S, 3]."""
        import torch

        if not images:
            return []
        batch = torch.from_numpy(np.stack(images)).to(next(self.network.parameters()).device)
        with torch.inference_mode():
            logits = self.network(self.pixels.for_evaluation(batch))
            values, labels = logits.float().softmax(dim=1).sort(dim=1, descending=True, stable=True)
        predictions = []
        for shares, order in zip(values.tolist(), labels.tolist(), strict=True):
            named = {self.classes[label]: p for label, p in zip(order, shares, strict=True)}
            predictions.append(Prediction(self.classes[order[0]], shares[0], named))
        return predictions

    def _decode(self, image: Any) -> np.ndarray:
        from PIL import Image

        from cifar_dist.data.decode import decode_image, fit_image

        try:
            if isinstance(image, (str, Path)):
                require(os.path.exists(image), f"'{image}' does not exist")
                return decode_image(image, self.image_size)
            if isinstance(image, np.ndarray):
                require(
                    image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3,
                    f"an image is an array of {image.dtype} {list(image.shape)}; expected uint8 "
                    "[H, W, 3]",
                )
                image = Image.fromarray(image)
            if isinstance(image, Image.Image):
                return fit_image(image, self.image_size)
        except ValueError as error:
            raise UsageError(_refusal({"image": image, "error": error})) from error
        raise UsageError(
            f"an image is a {type(image).__name__}; expected a path, a PIL image or a uint8 array"
        )


def load(place: str | Path, best: bool = False, model: Any = None) -> Classifier:
    """Load the network of a run.

    Args:
        place: a run folder (its newest checkpoint is meant) or one checkpoint's folder.
        best: of a run folder, the best checkpoint by validation instead of the newest.
        model: the network, if it is code of the user's own: its name, class or function.

    Raises:
        UserCodeError: the user's code raised an exception.
        UsageError: no such checkpoint, or the user's code is not given or has changed.
    """
    import torch

    from cifar_dist.config import AugmentConfig
    from cifar_dist.data.augment import Pixels
    from cifar_dist.speedups import speed_up
    from cifar_dist.storage.checkpoint import find_weights
    from cifar_dist.storage.weights import restore_network

    path, (progress, weights) = find_weights(str(place), best)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    network, pixels = speed_up(
        restore_network(progress, weights, path, model).to(device),
        Pixels(progress.mean, progress.std, AugmentConfig(), seed=0),
    )
    return Classifier(network, progress.classes, progress.image_size, pixels, path.parent.parent)


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
