"""Shuffling and sharding: the images of each global batch, and the slice that each rank gets.

The order of an epoch is a function of (seed, epoch) alone. Batches are global: Accelerate gives
each process its contiguous slice of every batch, without padding or duplicates, so the world size
does not change the batches.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar_dist.data.images import Images

# Evaluation batch size per process for images of CIFAR's size; larger images get smaller batches.
# On a GPU it is the batch size of cifar10-94: cuDNN benchmarks its algorithms for every batch size.
EVALUATION_BATCH, EVALUATION_BATCH_ON_GPU = 256, 2000
RESIDENT_BYTES = 4 << 30  # datasets up to this size are kept in the accelerator's memory


class Batch(NamedTuple):
    """Images uint8 [N, H, W, 3], labels int64 [N], positions in the dataset int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Gathers whole batches by position, on the device if the images fit into its memory."""

    def __init__(self, images: Images, device: torch.device) -> None:
        self.rows = torch.from_numpy(images.selected)
        self.images = torch.from_numpy(images.images)
        self.labels = torch.from_numpy(images.labels)
        bytes_used = len(self.rows) * self.images[0].numel()
        if device.type != "cpu" and bytes_used <= RESIDENT_BYTES:
            self.images = self.images[self.rows].to(device)
            self.labels = self.labels[self.rows].to(device)
            self.rows = torch.arange(len(self.rows), device=device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: torch.Tensor) -> Batch:
        rows = self.rows[positions]
        return Batch(
            self.images.index_select(0, rows), self.labels.index_select(0, rows), positions
        )


class GlobalBatches(Sampler[torch.Tensor]):
    """Sampler of the positions in each global batch, int64 [batch_size].

    Args:
        size: number of images in the dataset.
        batch_size: images per batch, over all processes.
        seed: shuffles each epoch and drops the last incomplete batch; None keeps the order and
            that batch.
        together: micro-batches per optimizer step (gradient accumulation); an incomplete last step
            is dropped too.
        device: device of the positions. They are copied once per epoch: a copy per batch would
            make the host wait for the device at every step.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int | None,
        together: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self.drop_last, self.together = seed is not None, together
        self.start_at(0, 0)

    def start_at(self, epoch: int, first: int, end: int | None = None) -> None:
        """Make the next iteration yield the batches from `first` to before `end` of `epoch`."""
        self.epoch, self.first, self.end = epoch, first, len(self) if end is None else end

    def __len__(self) -> int:
        whole = self.size // (self.batch_size * self.together) * self.together
        return whole if self.drop_last else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = torch.arange(self.size)
        if self.seed is not None:
            order = permutation(self.size, self.seed, self.epoch)
        order = order.to(self.device)
        for batch in range(self.first, self.end):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


def permutation(size: int, seed: int, epoch: int) -> torch.Tensor:
    """Return the shuffled order of an epoch, int64 [size]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)


def build_loader(
    accelerator: Accelerator, images: Images, batch_size: int, seed: int | None, together: int = 1
) -> tuple[DataLoader, GlobalBatches]:
    """Return the loader of this process's slices, and the sampler that sets where it starts."""
    dataset = ImageDataset(images, accelerator.device)
    sampler = GlobalBatches(len(images), batch_size, seed, together, dataset.rows.device)
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]  # batches of positions as tensors
        collate_fn=lambda batch: batch,
    )
    return accelerator.prepare(loader), sampler


def build_evaluation_loader(accelerator: Accelerator, images: Images) -> DataLoader:
    """Return a loader that yields every image exactly once across all processes."""
    most = EVALUATION_BATCH if accelerator.device.type == "cpu" else EVALUATION_BATCH_ON_GPU
    height, width = images.images.shape[1:3]
    each = max(1, min(most, most * 32 * 32 // (height * width)))
    return build_loader(accelerator, images, each * accelerator.num_processes, None)[0]
