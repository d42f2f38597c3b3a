"""What people watch: scalars and pictures, through Accelerate's trackers, on rank 0 only."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import nn

from cifar_dist.config import Recipe, dump_recipe, flatten
from cifar_dist.data.images import Images
from cifar_dist.runfolder import Warned

TILES = 64  # images in a grid
WRONG = 32  # wrong test images in a picture
LABEL_HEIGHT = 12  # pixels of text under a picture


class Tracker:
    """Sends scalars and pictures to all trackers of the recipe.

    A tracker that fails is warned of once and left out from then on; the run goes on.

    Args:
        out: run folder; TensorBoard's files go to its folder `tensorboard`.
        step: what a run is continued from; anything tracked after it is withdrawn.
        warned: takes the warnings.
    """

    def __init__(
        self, accelerator: Accelerator, recipe: Recipe, out: Path, step: int, warned: Warned
    ) -> None:
        self._warned, self._trackers = warned, []
        if not accelerator.is_main_process:
            return
        accelerator.project_configuration.logging_dir = str(out)
        purge_step = step + 1 if step else 0
        with warned.spare("tracking"):
            accelerator.init_trackers(
                "tensorboard", init_kwargs={"tensorboard": {"purge_step": purge_step}}
            )
            self._trackers = list(accelerator.trackers)
        if not step:
            self._each(lambda tracker: _store(tracker, recipe))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record named numbers at a step."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Record a picture, uint8 [H, W, 3], with every tracker that takes pictures."""

        def record(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                extra = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: image[None]}, step=step, **extra)

        self._each(record)

    def graph(self, network: nn.Module, images: torch.Tensor) -> None:
        """Record the network's graph in TensorBoard, traced on `images` [N, 3, H, W]."""

        def record(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                with warnings.catch_warnings():  # TensorBoard has no other tracer than torch.jit
                    warnings.simplefilter("ignore")
                    # Traced here: TensorBoard would trace it twice more, to compare.
                    traced = torch.jit.trace(network.eval(), images, check_trace=False)
                    tracker.writer.add_graph(traced, images)

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
    if tracker.name == "tensorboard":  # as text: its hparams would fill a folder a start
        tracker.writer.add_text("recipe", f"```\n{dump_recipe(recipe)}```", 0)
    else:
        tracker.store_init_configuration(flatten(recipe))


def image_grid(images: np.ndarray, captions: Sequence[str] | None = None) -> np.ndarray:
    """Lay out uint8 [N, H, W, 3] in rows of eight, each with its caption; uint8 [H', W', 3]."""
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
    """Show wrongly recognised images as "truth > prediction", or None where there is none.

    Args:
        wrong: (position in `images`, predicted label).
    """
    if not wrong:
        return None
    wrong = wrong[:: -(-len(wrong) // WRONG)]  # from all over the set, hence of all classes
    positions = np.array([position for position, _ in wrong])
    rows = images.selected[positions]
    names = [name[:6] for name in images.classes]
    captions = [
        f"{names[images.labels[row]]}>{names[predicted]}"
        for row, (_, predicted) in zip(rows, wrong, strict=False)
    ]
    return image_grid(np.asarray(images.images[rows]), captions)


def confusion_picture(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix, int64 [C, C]: rows are the truth, darker means more of the row."""
    count = len(classes)
    cell = max(8, min(48, 960 // count))
    margin = 80
    canvas = Image.new("RGB", (margin + count * cell, margin + count * cell), "white")
    draw = ImageDraw.Draw(canvas)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    for row in range(count):
        if cell >= 12:
            draw.text((2, margin + (row + 0.3) * cell), classes[row][:13], fill="black")
            draw.text(
                (margin + row * cell + 2, margin - 14 - row % 2 * 12),
                classes[row][:8],
                fill="black",
            )
        for column in range(count):
            x, y = margin + column * cell, margin + row * cell
            level = int(255 * (1 - share[row, column]))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(level, level, 255))
            if cell >= 32:
                text = "white" if share[row, column] > 0.5 else "black"
                draw.text((x + 4, y + cell * 0.35), str(confusion[row, column]), fill=text)
    draw.text((2, 2), "rows: truth, columns: prediction", fill="black")
    return np.asarray(canvas)
