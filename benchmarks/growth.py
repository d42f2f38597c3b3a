"""Measure time, memory and start-up with ten times the images, larger images and wider networks.

`python -m benchmarks.growth [--images FEWER MORE] [--batch N] [--rounds N]`

Synthetic images are written as files, decoded by a first start, and trained on by `cifar-dist
train` with the network `tutorial`, or `speednet` to vary the width. The time of an epoch includes
the evaluation of a fifth as many test images, the reports and the checkpoint.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.harness import RESULTS, Subject, measure, median, paired, record, spread, table
from benchmarks.startup import TRAIN, Start
from cifar_dist.data.batches import EVALUATION_BATCH
from cifar_dist.data.synthetic import SHAPES, draw

SIDE = 32
CHUNK = 500  # images generated at a time
STARTS = 3  # per round of epochs, because a start is short and varies more
SPEEDNET = ("--model.name", "speednet", "--model.depth", "1", "--model.stride", "2")


@dataclass
class Case:
    """A row of the table.

    Attributes:
        name: of the row.
        reference: name of the row that it is compared with.
        images: number of training images.
        side: width and height of an image in pixels.
        own: options of the network.
    """

    name: str
    reference: str
    images: int
    side: int = SIDE
    own: tuple[str, ...] = ()

    def arguments(self, folder: str, batch: int) -> list[str]:
        """Return the arguments of `python` that train one epoch per round."""
        return [
            *(*TRAIN, str(self.images // batch), "--config", "tutorial", *self.own),
            *("--train.batch_size", str(batch), "--train.epochs", "1000000"),
            *("--data.name", "imagefolder", "--data.root", f"{folder}/{self.images}"),
            *("--data.image_size", str(self.side), "--data.cache", f"{folder}/cache"),
        ]

    @property
    def megabytes(self) -> float:
        """The size of the training and test images in memory."""
        return (self.images + test_images(self.images)) * 3 * self.side**2 / (1 << 20)


def test_images(images: int) -> int:
    """Return the number of test images: at least a full batch, which determines the memory."""
    return max(images // 5, EVALUATION_BATCH)


def write_images(root: Path, images: int) -> None:
    """Write synthetic images as BMP files, which are fast to write and to decode."""
    for part, count in (("train", images), ("test", test_images(images))):
        for name in SHAPES:
            (root / part / name).mkdir(parents=True)
        for first in range(0, count, CHUNK):
            drawn = draw(min(CHUNK, count - first), SIDE, seed=(images, count, first))
            for row, label in enumerate(drawn.labels):
                path = root / part / drawn.classes[label] / f"{first + row}.bmp"
                Image.fromarray(drawn.images[row]).save(path)


def main() -> None:
    """Measure, and write results/growth.md and .json."""
    parser = argparse.ArgumentParser("benchmarks.growth", description=__doc__)
    parser.add_argument(
        "--images", type=int, nargs=2, default=[5000, 50000], help="training images"
    )
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    fewer, more = options.images
    first, network = f"{fewer} images", "speednet"
    cases = [
        Case(first, first, fewer),
        Case(f"{more} images", first, more),
        Case(f"{fewer} images of {2 * SIDE} pixels", first, fewer, side=2 * SIDE),
        Case(network, network, fewer, own=(*SPEEDNET, "--model.widths", "[32,64,64]")),
        Case(
            f"{network}, twice as wide",
            *(network, fewer),
            own=(*SPEEDNET, "--model.widths", "[64,128,128]"),
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for images in options.images:
            write_images(Path(folder, str(images)), images)
        commands = {case.name: case.arguments(folder, options.batch) for case in cases}
        places = {"TMPDIR": folder}
        starts = [Start(name, command, places, steps=True) for name, command in commands.items()]
        start_up = measure(starts, STARTS * options.rounds)
        subjects = [Subject(name, command, places) for name, command in commands.items()]
        epochs = measure(subjects, options.rounds)
    peaks = {name: reports[-1]["peak_mb"] for name, reports in epochs.items()}
    rows = []
    for case in cases:
        name, reference = case.name, next(each for each in cases if each.name == case.reference)
        trained, before = (each.images // options.batch for each in (case, reference))
        ratios = [ratio * before / trained for ratio in paired(epochs, reference.name, name)]
        beyond = peaks[name] - peaks[reference.name] - (case.megabytes - reference.megabytes)
        seconds = median(epochs, name, "wall")
        rows.append(
            [
                name,
                f"{seconds:.2f}",
                f"{1e3 * seconds / trained / options.batch:.3f}",
                spread(ratios),
                f"{peaks[name]:.0f}",
                f"{case.megabytes:.0f}",
                f"{beyond:.0f}",
                f"{median(start_up, name, 'wall'):.2f}",
                spread(paired(start_up, reference.name, name)),
            ]
        )
    head = [
        *("", "seconds per epoch", "ms per image", "ratio", "peak MB", "images MB"),
        *("peak beyond images, MB", "seconds to start", "ratio"),
    ]
    record(
        options.results,
        "growth",
        f"Growth: batch {options.batch}, {options.rounds} rounds with {STARTS} starts each",
        table(head, rows),
        {"images": options.images, "batch": options.batch, "start_up": start_up, "epochs": epochs},
        f"Ratios are to `{first}` or `{network}` in the same round. For the time per image it is "
        "the ratio of epoch times divided by that of image counts. `Peak beyond images` is the "
        "growth of peak memory minus the growth of the images, at one byte per value. The seconds "
        "to start are from the command to the end of the first step, with the images already "
        "decoded.",
    )


if __name__ == "__main__":
    main()
