"""Metrics as sums and counts, which are exact at any world size and are divided once at the end."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Totals:
    """Sums over samples of all processes."""

    loss_sum: float = 0.0
    correct: int = 0
    count: int = 0

    @property
    def loss(self) -> float:
        """Mean loss per sample."""
        return self.loss_sum / self.count

    @property
    def accuracy(self) -> float:
        """Share of correct samples."""
        return self.correct / self.count

    def since(self, earlier: "Totals") -> "Totals":
        """Return the difference to `earlier` totals of the same samples."""
        return Totals(
            self.loss_sum - earlier.loss_sum,
            self.correct - earlier.correct,
            self.count - earlier.count,
        )


class Tally:
    """Running sums of one process, kept on its device so that no step waits for the device.

    Attributes:
        sums: float [3]: loss, correct samples, samples.
    """

    def __init__(self, device: torch.device) -> None:
        # MPS has no float64; float32 counts exactly up to 16 million samples.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=dtype, device=device)

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch.

        Args:
            loss_sum: sum over the samples, float [].
            logits: float [N, C].
            labels: int64 [N].
        """
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        count = torch.full_like(correct, len(labels))
        self.sums += torch.stack([loss_sum.detach().to(self.sums.dtype), correct, count])

    def totals(self, accelerator: Accelerator) -> Totals:
        """Sum over all processes; every process must call it."""
        loss_sum, correct, count = reduce_sum(accelerator, self.sums).tolist()
        return Totals(loss_sum, int(correct), int(count))


@dataclass(frozen=True)
class Evaluation:
    """Exact result of evaluating every image of a set once.

    Attributes:
        loss_sum: of the cross-entropy over all images.
        classes: number of classes C.
        pairs: int64 [K, 3], sorted: true label, predicted label, number of images. Pairs without
            an image are left out, so memory grows with the images and not with C squared.
        bins: float64 [3, B] by confidence: images, correct ones, sum of confidences.
        wrong: (position, predicted label) of the images that this process misclassified.
    """

    loss_sum: float
    classes: int
    pairs: np.ndarray
    bins: np.ndarray
    wrong: list[tuple[int, int]]

    @property
    def totals(self) -> Totals:
        """Loss and accuracy as sums."""
        truth, predicted, images = self.pairs.T
        return Totals(self.loss_sum, int(images[truth == predicted].sum()), int(images.sum()))

    @property
    def per_class(self) -> list[float]:
        """Recall of each class; NaN for a class without images."""
        truth, predicted, images = self.pairs.T
        counts = np.bincount(truth, images, minlength=self.classes)
        recalled = np.bincount(truth, images * (truth == predicted), minlength=self.classes)
        shares = np.where(counts > 0, recalled / np.maximum(counts, 1), np.nan)
        return [float(share) for share in shares]

    @property
    def confusion(self) -> np.ndarray:
        """Confusion matrix, int64 [C, C]: rows are true classes, columns are predicted classes."""
        return self.coarse_confusion(self.classes)

    def coarse_confusion(self, most: int) -> np.ndarray:
        """Return the confusion matrix with at most `most` rows; int64 [S, S], S = min(C, most).

        If C is larger, neighbouring classes share a row and a column.
        """
        side = min(self.classes, most)
        truth, predicted, images = self.pairs.T
        matrix = np.zeros((side, side), dtype=np.int64)
        cells = truth * side // self.classes, predicted * side // self.classes
        np.add.at(matrix, cells, images)
        return matrix

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over bins of equal width (Guo et al., 2017)."""
        images, correct, confidence = self.bins
        return float(np.abs(correct - confidence).sum() / images.sum())


class Outcome(NamedTuple):
    """Prediction and loss per image: positions, labels, predicted int64 [N]; others float [N].

    `confidence` is the probability of the predicted class.
    """

    positions: torch.Tensor
    labels: torch.Tensor
    predicted: torch.Tensor
    confidence: torch.Tensor
    losses: torch.Tensor

    @classmethod
    def empty(cls, images: int, device: torch.device) -> "Outcome":
        """Allocate the outcome of `images` images."""
        kinds = [torch.long] * 3 + [torch.float] * 2
        return cls(*(torch.empty(images, dtype=kind, device=device) for kind in kinds))


def summarise(accelerator: Accelerator, outcome: Outcome, classes: int) -> Evaluation:
    """Build the Evaluation of the images of all processes; every process must call it.

    Args:
        outcome: of the images of this process, which may be none.
    """
    positions, truth, predicted, confidence, losses = (part.numpy() for part in outcome)
    confidence = confidence.astype(np.float64)
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    parts = [
        losses.sum(dtype=np.float64, keepdims=True),
        np.bincount(bins, minlength=CALIBRATION_BINS),
        np.bincount(bins, weights=predicted == truth, minlength=CALIBRATION_BINS),
        np.bincount(bins, weights=confidence, minlength=CALIBRATION_BINS),
    ]
    # float64 holds these counts exactly, so one collective carries them with the loss.
    sums = torch.from_numpy(np.concatenate(parts).astype(np.float64))
    if accelerator.num_processes > 1:
        sums = reduce_sum(accelerator, sums.to(accelerator.device)).cpu()
    loss_sum, binned = np.split(sums.numpy(), [1])
    wrong = np.flatnonzero(predicted != truth)
    return Evaluation(
        loss_sum=float(loss_sum[0]),
        classes=classes,
        pairs=_count_pairs(accelerator, truth, predicted, classes),
        bins=binned.reshape(3, CALIBRATION_BINS),
        wrong=list(zip(positions[wrong].tolist(), predicted[wrong].tolist(), strict=True)),
    )


def _count_pairs(
    accelerator: Accelerator, truth: np.ndarray, predicted: np.ndarray, classes: int
) -> np.ndarray:
    """Return `Evaluation.pairs` of all processes.

    Args:
        truth, predicted: labels of this process, int64 [N].
    """
    codes, images = np.unique(truth * classes + predicted, return_counts=True)
    if accelerator.num_processes > 1:
        mine = torch.from_numpy(np.stack([codes, images], axis=1)).to(accelerator.device)
        # Rows added by padding have an image count of 0.
        rows = accelerator.gather(accelerator.pad_across_processes(mine)).cpu().numpy()
        codes, places = np.unique(rows[:, 0], return_inverse=True)
        images = np.zeros(len(codes), dtype=np.int64)
        np.add.at(images, places, rows[:, 1])
    pairs = np.stack([codes // classes, codes % classes, images], axis=1)
    return pairs[images > 0]


def reduce_sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all processes into a new one."""
    if accelerator.num_processes == 1:
        return values.clone()
    return accelerator.reduce(values.clone(), reduction="sum")
