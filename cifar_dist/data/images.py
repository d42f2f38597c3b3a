"""Decoded images in memory, and the choice of subsets."""

from dataclasses import dataclass, field, replace

import numpy as np

from cifar_dist.data.listing import LeftOut


@dataclass(frozen=True)
class Images:
    """Decoded images with their labels.

    Attributes:
        images: uint8 [N, H, W, 3], usually memory-mapped and shared by all processes.
        labels: int64 [N], indices into `classes`.
        classes: names, in label order.
        rows: int64 [M], the rows of the arrays that belong to this set; None means all of them.
            A subset shares the arrays of the whole set and copies nothing.
        digests: uint64 [N], equal for images with equal pixels; None if not computed.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    rows: np.ndarray | None = None
    digests: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels if self.rows is None else self.rows)

    @property
    def selected(self) -> np.ndarray:
        """The rows of this set, int64 [M]."""
        return np.arange(len(self.labels)) if self.rows is None else self.rows

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return int(self.images.shape[1])

    def take(self, positions: np.ndarray) -> "Images":
        """Return the subset at `positions` (int64 [M], indices into this set), in their order."""
        return replace(self, rows=self.selected[positions])

    def relabelled(self, classes: tuple[str, ...]) -> "Images":
        """Return the same images with labels that index `classes`, the same names in any order."""
        places = np.array([classes.index(name) for name in self.classes])
        return replace(self, labels=places[self.labels], classes=classes)

    def limited(self, count: int | None, seed: int) -> "Images":
        """Return `count` images chosen by `seed`, or all of them if there are no more."""
        if count is None or count >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.take(np.sort(chosen))

    def identical_to(self, other: "Images") -> int:
        """Return the number of images whose pixels equal those of an image in `other`."""
        if self.digests is None or other.digests is None:
            return 0
        known = other.digests[other.selected]
        return int(np.isin(self.digests[self.selected], known).sum())

    def absent_classes(self) -> list[str]:
        """Return the names of the classes without an image in this set."""
        counts = np.bincount(self.labels[self.selected], minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if not count]

    def split(self, fraction: float, seed: int) -> tuple["Images", "Images"]:
        """Hold out `fraction` of every class, chosen by `seed`.

        At least one image of each class is held out, and at least one stays. The only image of a
        class stays.

        Returns:
            The remaining images and the held-out images.
        """
        labels = self.labels[self.selected]
        order = np.random.default_rng(seed).permutation(len(labels))
        held_out = np.zeros(len(labels), dtype=bool)
        for label in np.unique(labels):
            members = order[labels[order] == label]
            count = max(1, round(fraction * len(members)))
            held_out[members[: min(count, len(members) - 1)]] = True
        return self.take(np.flatnonzero(~held_out)), self.take(np.flatnonzero(held_out))


@dataclass(frozen=True)
class Source:
    """A dataset before it is split and limited.

    Attributes:
        splits: "train", "test" and "val", those that exist.
        mean, std: per channel, of the training images scaled to [0, 1].
        digest: SHA-256 of all pixels, labels and class names.
        skipped: files left out because they could not be decoded, each with the reason.
        left_out: number of files that do not count as images, by reason and suffix.
    """

    splits: dict[str, Images]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    skipped: tuple[str, ...] = ()
    left_out: LeftOut = field(default_factory=dict)
