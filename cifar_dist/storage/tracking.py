"""Scalars and images for Accelerate's trackers, on rank 0 only."""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL import Image, ImageDraw
from torch import nn

from cifar_dist.config import Recipe, dump_recipe, flatten
from cifar_dist.data.images import Images
from cifar_dist.storage.folder import Warned

PROJECT = "cifar-dist"  # of every recipe, so that runs of different recipes can be compared
TILES = 64  # images in a grid
WRONG = 32  # misclassified images in a picture
LABEL_HEIGHT = 12  # of the caption under an image, in pixels
# Width of a confusion matrix in pixels, so also the maximum number of rows.
CONFUSION_SIDE = 960


class Tracker:
    """Sends scalars and images to all trackers of the recipe.

    A tracker that fails causes one warning and is not used again. The run continues.

    Args:
        out: run folder; TensorBoard's files are in it, so that its name is the run's name there.
        step: optimizer step from which a run is resumed; TensorBoard discards later ones.
        warned: records the failures.
    """

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, out: Path, step: int, warned: Warned
    ) -> None:
        self._warned = warned
        self._trackers: list[Any] = []
        if not accelerator.is_main_process:
            return
        accelerator.project_configuration.logging_dir = str(out)
        # TensorBoard's folder would be named after the project, unless its tracker is given.
        board = TensorBoardTracker(".", out, purge_step=step + 1 if step else 0)
        accelerator.log_with = [
            board if str(name) == board.name else name for name in accelerator.log_with
        ]
        with warned.spare("tracking"):
            accelerator.init_trackers(PROJECT)
            self._trackers = list(accelerator.trackers)
        if not step:
            self._each(lambda tracker: _store(tracker, recipe))

    @property
    def active(self) -> bool:
        """Whether there are trackers; without them nothing needs to be computed for them."""
        return bool(self._trackers)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record named numbers at a step."""
        plain = {printable(name): value for name, value in values.items()}
        self._each(lambda tracker: tracker.log(plain, step=step))

    def picture(self, name: str, draw: Callable[[], np.ndarray | None], step: int) -> None:
        """Record an image with every tracker that supports images.

        Args:
            draw: returns uint8 [H, W, 3], or None for no image. Called only if a tracker supports
                images. If it fails, there is one warning, and it is not called again.
        """
        what = f"the picture {name}"
        taken = any(hasattr(tracker, "log_images") for tracker in self._trackers)
        image = None
        if taken and what not in self._warned.reasons:
            with self._warned.spare(what):
                image = draw()
        if image is None:
            return
        images = {name: image[None]}

        def record(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(images, step=step, **extra)

        self._each(record)

    def graph(self, network: nn.Module, images: torch.Tensor) -> None:
        """Record the network's graph in TensorBoard, traced on `images`, float [N, 3, H, W].

        A copy is traced, because a forward pass may change buffers. A network that cannot be traced
        causes a warning.
        """
        if not any(tracker.name == "tensorboard" for tracker in self._trackers):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace, which TensorBoard uses, warns
            traced = None
            with self._warned.spare("the graph of the network"):
                # Traced here, because TensorBoard would trace it three times to compare.
                traced = torch.jit.trace(copy.deepcopy(network).eval(), images, check_trace=False)

            def record(tracker: Any) -> None:
                if traced is not None and tracker.name == "tensorboard":
                    tracker.writer.add_graph(traced, images)

            self._each(record)

    def charts(self, tags: Mapping[str, Sequence[str]]) -> None:
        """Let TensorBoard show several curves in one chart, under "Custom scalars".

        Args:
            tags: the curves of each chart, by its title.
        """
        layout = {title: {title: ["Multiline", list(names)]} for title, names in tags.items()}

        def record(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.writer.add_custom_scalars(layout)

        self._each(record)

    def result(self, recipe: Recipe, metrics: Mapping[str, float]) -> None:
        """Record the options and the final metrics for TensorBoard's table of runs (HParams)."""
        from torch.utils.tensorboard.summary import hparams

        plain = {
            key: value if isinstance(value, (bool, int, float)) else str(value)
            for key, value in flatten(recipe).items()
        }

        def record(tracker: Any) -> None:
            if tracker.name == "tensorboard":  # add_hparams would write to a folder of its own
                for summary in hparams(plain, dict(metrics)):
                    tracker.writer.file_writer.add_summary(summary)

        self._each(record)

    def finish(self) -> None:
        """Flush and close."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, record: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            what = f"the tracker {tracker.name}"
            with self._warned.spare(what):
                record(tracker)
            if what in self._warned.reasons:
                self._trackers.remove(tracker)


def _store(tracker: Any, recipe: Recipe) -> None:
    if tracker.name == "tensorboard":  # as text: add_hparams writes a new folder at each start
        tracker.writer.add_text("recipe", f"```\n{dump_recipe(recipe)}```", 0)
    else:
        tracker.store_init_configuration(flatten(recipe))


def printable(name: str) -> str:
    """Return a name without surrogates, which no Unicode encoding can encode.

    A file name that is not valid UTF-8 contains them.
    """
    return name.encode(errors="backslashreplace").decode()


def image_grid(images: np.ndarray, captions: Sequence[str] | None = None) -> np.ndarray:
    """Arrange images in rows of eight.

    Args:
        images: uint8 [N, H, W, 3].
        captions: text under each image.

    Returns:
        uint8 [H', W', 3].
    """
    count, height, width, _ = images.shape
    scale = -(-64 // width)  # small images are shown at 64 pixels or more, so captions fit
    tile_width, tile_height = width * scale, height * scale + (LABEL_HEIGHT if captions else 0)
    canvas = Image.new("RGB", (8 * tile_width, -(-count // 8) * tile_height), "white")
    draw = ImageDraw.Draw(canvas)
    for number, pixels in enumerate(images):
        x, y = number % 8 * tile_width, number // 8 * tile_height
        tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.BOX)
        canvas.paste(tile, (x, y))
        if captions:
            draw.text((x + 1, y + height * scale), captions[number], fill="black", font_size=9)
    return np.asarray(canvas)


def wrong_images(images: Images, wrong: Sequence[tuple[int, int]]) -> np.ndarray | None:
    """Draw misclassified images with the caption "truth>prediction"; None if there are none.

    Args:
        wrong: (position in `images`, predicted label).
    """
    if not wrong:
        return None
    wrong = wrong[:: -(-len(wrong) // WRONG)]  # evenly spaced, so that all classes appear
    positions = np.array([position for position, _ in wrong])
    rows = images.selected[positions]
    names = [printable(name[:6]) for name in images.classes]
    captions = [
        f"{names[images.labels[row]]}>{names[predicted]}"
        for row, (_, predicted) in zip(rows, wrong, strict=False)
    ]
    return image_grid(np.asarray(images.images[rows]), captions)


def confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, uint8 [H, W, 3]; rows are true classes, normalised to sum to 1.

    Args:
        confusion: int64 [S, S], S up to CONFUSION_SIDE; see `Evaluation.coarse_confusion`.
        classes: names, one per row, drawn if there is room for them.
    """
    count = len(confusion)
    cell = max(1, min(48, CONFUSION_SIDE // count))
    margin = 80
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    levels = (255 * (1 - share)).astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    cells = np.stack([levels, levels, np.full_like(levels, 255)], axis=2)
    canvas = Image.new("RGB", (margin + count * cell, margin + count * cell), "white")
    canvas.paste(Image.fromarray(cells), (margin, margin))
    draw = ImageDraw.Draw(canvas)
    draw.text((2, 2), "rows: truth, columns: prediction", fill="black")
    if cell < 12:
        return np.asarray(canvas)
    for row, name in enumerate(map(printable, classes)):
        draw.text((2, margin + (row + 0.3) * cell), name[:13], fill="black")
        draw.text((margin + row * cell + 2, margin - 14 - row % 2 * 12), name[:8], fill="black")
        for column in range(count if cell >= 32 else 0):
            text = "white" if share[row, column] > 0.5 else "black"
            place = margin + column * cell + 4, margin + (row + 0.35) * cell
            draw.text(place, str(confusion[row, column]), fill=text)
    return np.asarray(canvas)
