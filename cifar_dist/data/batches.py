"""Order and shards: which images form each global batch, and which part a process works on.

The order of an epoch is a function of (seed, epoch) alone. Batches are global: Accelerate gives
each process its contiguous slice of every one, without padding or duplicates, so the number of
processes does not change what is trained on.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from cifar_dist.data.images import Images

# Images of CIFAR's size per process and forward pass of an evaluation, of larger ones fewer. On a
# GPU as many as cifar10-94 trains on: cuDNN measures its algorithms anew for every batch size.
EVALUATION_BATCH, EVALUATION_BATCH_ON_GPU = 256, 2000
RESIDENT_BYTES = 4 << 30  # datasets up to this size are kept on the accelerator


class Batch(NamedTuple):
    """Images uint8 [N, H, W, 3], labels int64 [N], positions in the set int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor


class ImageDataset(Dataset[Batch]):
    """Gathers whole batches by position, from the device itself where the images fit there."""

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

    @property
    def device(self) -> torch.device:
        """Where the images are; positions must be there too."""
        return self.rows.device

    def __getitems__(self, positions: torch.Tensor) -> Batch:
        rows = self.rows[positions]
        return Batch(
            self.images.index_select(0, rows), self.labels.index_select(0, rows), positions
        )


class GlobalBatches(Sampler[torch.Tensor]):
    """Positions of each global batch, int64 [batch_size].

    Args:
        size: images in the set.
        batch_size: images per batch, over all processes.
        seed: shuffles each epoch and drops the tail that does not fill a batch; None keeps the
            order and the tail.
        together: batches of an optimizer step; a tail that does not fill a step is dropped too.
        device: of the positions. They are sent there once an epoch: to send each batch's would have
            the host wait for the device at every step.
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
        """Make the next iteration that of `epoch`, from batch `first` to before batch `end`."""
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
    """Return the order of an epoch, int64 [size]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator)


def build_loader(
    accelerator: Accelerator, images: Images, batch_size: int, seed: int | None, together: int = 1
) -> tuple[DataLoader, GlobalBatches]:
    """Return the loader of this process's shards, and the sampler that says where it starts."""
    dataset = ImageDataset(images, accelerator.device)
    sampler = GlobalBatches(len(images), batch_size, seed, together, dataset.device)
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=sampler,  # type: ignore[arg-type]  # batches of positions as tensors
        collate_fn=_as_it_is,
    )
    return accelerator.prepare(loader), sampler


def build_evaluation_loader(accelerator: Accelerator, images: Images) -> DataLoader:
    """Return a loader over every image exactly once, over all processes."""
    most = EVALUATION_BATCH if accelerator.device.type == "cpu" else EVALUATION_BATCH_ON_GPU
    height, width = images.images.shape[1:3]
    each = max(1, min(most, most * 32 * 32 // (height * width)))
    return build_loader(accelerator, images, each * accelerator.num_processes, None)[0]


def _as_it_is(batch: Any) -> Any:
    return batch
