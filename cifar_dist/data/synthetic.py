"""A synthetic dataset of ten classes of drawn shapes; needs no files and little time.

Each image has one shape of random colour, position, scale and rotation on a background of another
random colour, with noise. Colour and position carry no information about the class, so a linear
model stays near chance level, while a small convolutional network learns it within seconds.
"""

import hashlib
import math
from collections.abc import Callable

import numpy as np

from cifar_dist.config import DataConfig
from cifar_dist.data.cache import channel_statistics, count_levels
from cifar_dist.data.images import Images, Source

Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]

# Each shape is a function of a point in its own coordinates, where it fills about [-1, 1]: negative
# inside, positive outside, in the manner of signed distance functions.
SHAPES: dict[str, Shape] = {
    "disc": lambda x, y: np.hypot(x, y) - 0.9,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.75) - 0.2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.8,
    "frame": lambda x, y: np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.7) - 0.18,
    "triangle": lambda x, y: np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.5,
    "plus": lambda x, y: np.maximum(
        np.minimum(np.abs(x), np.abs(y)) - 0.25, np.maximum(np.abs(x), np.abs(y)) - 0.95
    ),
    "bar": lambda x, y: np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.28),
    "two bars": lambda x, y: np.maximum(np.abs(x) - 1.0, np.abs(np.abs(y) - 0.6) - 0.22),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.75 - np.hypot(x - 0.45, y)),
    "four dots": lambda x, y: np.hypot(np.abs(x) - 0.6, np.abs(y) - 0.6) - 0.33,
}
SIZES = {"train": 8000, "test": 2000}  # images drawn unless data.limit_* is set


def load_synthetic(config: DataConfig) -> Source:
    """Draw the dataset; data.limit_train and data.limit_test set the number of images."""
    size = config.side
    splits = {
        split: draw(count, size, seed=(config.seed, number))
        for number, (split, count) in enumerate(counts(config).items())
    }
    digest = hashlib.sha256()
    for images in splits.values():
        digest.update(images.images.data)
    mean, std = channel_statistics(count_levels(splits["train"].images))
    return Source(splits, mean, std, digest.hexdigest())


def counts(config: DataConfig) -> dict[str, int]:
    """Return the number of images to draw for each split."""
    train = config.limit_train or SIZES["train"]
    if config.limit_train and config.val_fraction:  # plus the images to hold out
        train = math.ceil(train / (1 - config.val_fraction)) + len(SHAPES)
    return {"train": train, "test": config.limit_test or SIZES["test"]}


def draw(count: int, size: int, seed: tuple[int, ...]) -> Images:
    """Draw `count` images of `size` x `size` pixels; the classes alternate."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % len(SHAPES)
    scale = random.uniform(0.5, 0.8, (count, 1, 1)).astype(np.float32)
    room = 1 - scale  # keeps the shape inside the image, apart from corners
    centre_x, centre_y = (random.uniform(-1, 1, (2, count, 1, 1)) * room).astype(np.float32)
    tilt = random.uniform(-0.4, 0.4, (count, 1, 1)).astype(np.float32)
    background, colour = _two_colours(random, count)

    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    shifted_x, shifted_y = (axis[None, None] - centre_x), (axis[None, :, None] - centre_y)
    x = (np.cos(tilt) * shifted_x + np.sin(tilt) * shifted_y) / scale
    y = (np.cos(tilt) * shifted_y - np.sin(tilt) * shifted_x) / scale
    distance = np.empty((count, size, size), dtype=np.float32)
    for label, shape in enumerate(SHAPES.values()):
        distance[labels == label] = shape(x[labels == label], y[labels == label])
    coverage = np.clip(0.5 - distance * scale * size / 2, 0, 1)[..., None]  # edges one pixel wide

    noise = random.normal(0, 10, (count, size, size, 3))
    pixels = background + coverage * (colour - background) + noise
    return Images(np.clip(pixels, 0, 255).astype(np.uint8), labels, tuple(SHAPES))


def _two_colours(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two float32 [N, 1, 1, 3] colours per image that differ clearly in one channel."""
    first = random.uniform(0, 255, (count, 3))
    second = random.uniform(0, 255, (count, 3))
    channel = random.integers(0, 3, count)
    rows = np.arange(count)
    second[rows, channel] = (first[rows, channel] + random.uniform(90, 165, count)) % 255
    return first[:, None, None].astype(np.float32), second[:, None, None].astype(np.float32)
