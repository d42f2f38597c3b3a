"""The subjects of benchmarks.loop: one function per training loop, all with the same network.

The harness starts `python -m benchmarks.peers SUBJECT --model NAME --batch N ...`. Each loop
follows the documentation of its library, uses the public interface, and calls `meter.tick()` after
every optimizer step. The `lean` variants use channels_last memory and switch off optional features
of the library. On a GPU all compute in bfloat16.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.data import add_options, as_tensors, data_options, load
from benchmarks.harness import Meter, best_of, wait_for_device
from cifar_dist.models.catalogue import MODELS

LR, MOMENTUM = 0.01, 0.9
FOREVER = 10**6  # epochs; the harness kills the subject
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


def precision() -> torch.autocast:
    """Return the autocast context of a forward pass."""
    return torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU)


class PillowImages(Dataset[tuple[Any, int]]):
    """Images in an array, converted to Pillow on access, as in torchvision.datasets.CIFAR10."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, transform: Any) -> None:
        self.images, self.labels, self.transform = images.numpy(), labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def network_of(options: argparse.Namespace, lean: bool) -> nn.Module:
    """Return the network without speed-ups."""
    torch.manual_seed(0)
    network = MODELS[options.model](10).to(DEVICE)
    return network.to(memory_format=torch.channels_last) if lean else network


def pillow_loader(options: argparse.Namespace) -> DataLoader:
    from torchvision.transforms import ToTensor

    dataset = PillowImages(*as_tensors(load(options)), ToTensor())
    return DataLoader(dataset, batch_size=options.batch, shuffle=True, drop_last=True)


def sgd(network: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)


def bare(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """Train on one batch in memory: an upper bound for every loop."""
    network = network_of(options, lean=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=MOMENTUM, fused=True)
    images = torch.rand(options.batch, 3, 32, 32, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (options.batch,), device=DEVICE)
    torch.backends.cudnn.benchmark = True
    while True:
        optimizer.zero_grad()
        with precision():
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        meter.tick()


def bare_kept(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """The same as `bare`, but glibc keeps freed memory, as in cifar_dist."""
    from cifar_dist.processes.start import keep_memory

    keep_memory()
    bare(meter, options, lean)


def cifar_dist(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """`cifar_dist.train.run`, pausing between its steps."""
    from cifar_dist.config import parse_recipe
    from cifar_dist.train import run
    from cifar_dist.training import run as story

    meter.follow(story)
    with tempfile.TemporaryDirectory() as folder:
        recipe, _ = parse_recipe(
            [
                *("--config", "tutorial", "--model.name", options.model, *data_options(options)),
                *("--optim.lr", str(LR), "--optim.momentum", str(MOMENTUM)),
                *("--train.batch_size", str(options.batch), "--train.epochs", str(FOREVER)),
                *("--train.compile", str(lean).lower(), "--out", f"{folder}/run"),
            ]
        )
        run(recipe)


def cifar_dist_compiled(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """The same as `cifar_dist`, with train.compile."""
    cifar_dist(meter, options, lean=True)


def tutorials(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """The single-file tutorials: Pillow, ToTensor, DataLoader, and a loop with `loss.item()`."""
    network, loader = network_of(options, lean), pillow_loader(options)
    optimizer, loss_of = torch.optim.SGD(network.parameters(), lr=LR), nn.CrossEntropyLoss()
    network.train()
    for _ in range(FOREVER):
        total = 0.0
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            with precision():
                loss = loss_of(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            meter.tick()


def accelerate(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """The loop of Accelerate's documentation, with a prepared scheduler."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not ON_GPU, mixed_precision="bf16" if ON_GPU else "no")
    network = network_of(options, lean)
    optimizer = sgd(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    network, optimizer, loader, scheduler = accelerator.prepare(
        network, optimizer, pillow_loader(options), scheduler
    )
    network.train()
    for _ in range(FOREVER):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            meter.tick()


def lightning(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """A LightningModule; lean: without logger, checkpoints, progress bar and summary."""
    from lightning import Callback, LightningModule, Trainer

    logging.getLogger("lightning").setLevel(logging.ERROR)

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network_of(options, lean)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            images, labels = batch
            loss = nn.functional.cross_entropy(self.network(images), labels)
            if not lean:
                self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.network)

    class Ticks(Callback):
        def on_train_batch_end(self, *arguments: Any) -> None:
            meter.tick()

    options_off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(options_off, False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if ON_GPU else "cpu",
            precision="bf16-mixed" if ON_GPU else "32-true",
            devices=1,
            max_epochs=FOREVER,
            callbacks=[Ticks()],
            default_root_dir=folder,
            **(off if lean else {}),
        )
        trainer.fit(Classifier(), pillow_loader(options))


def timm(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """timm's loader and optimizer, with the step of its training script."""
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2

    loader = create_loader(
        PillowImages(*as_tensors(load(options)), None),
        input_size=(3, 32, 32),
        batch_size=options.batch,
        is_training=True,
        no_aug=True,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        num_workers=0,
        use_prefetcher=False,
        persistent_workers=False,
        device=torch.device(DEVICE),
    )
    network = network_of(options, lean)
    optimizer = create_optimizer_v2(network, opt="sgd", lr=LR, momentum=MOMENTUM)
    loss_of = nn.CrossEntropyLoss()
    for _ in range(FOREVER):
        network.train()
        for images, labels in loader:
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            if lean:
                images = images.contiguous(memory_format=torch.channels_last)
            with precision():
                loss = loss_of(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            meter.tick()


def airbench(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """airbench's loader in float32, with the step of its `train`."""
    from airbench import CifarLoader

    images, labels = as_tensors(load(options))
    with tempfile.TemporaryDirectory() as folder:
        content = {"images": images, "labels": labels, "classes": list(range(10))}
        torch.save(content, Path(folder) / "train.pt")
        loader = CifarLoader(folder, train=True, batch_size=options.batch, gpu=DEVICE)
    loader.images = loader.images.float()
    network = network_of(options, lean)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loss_of = nn.CrossEntropyLoss(reduction="none")
    for _ in range(FOREVER):
        network.train()
        for inputs, targets in loader:
            with precision():
                loss = loss_of(network(inputs), targets).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            meter.tick()


def ceilings(meter: Meter, options: argparse.Namespace, lean: bool) -> None:
    """Measure the peak rates of matrix products, convolutions and memory copies."""
    kind = torch.bfloat16 if ON_GPU else torch.float32
    side, channels, images, copied = (
        (8192, 64, 8192, 1 << 30) if ON_GPU else (1024, 64, 64, 1 << 26)
    )
    matrix = torch.randn(side, side, device=DEVICE, dtype=kind)
    block = torch.randn(images, channels, 16, 16, device=DEVICE, dtype=kind)
    block = block.contiguous(memory_format=torch.channels_last)
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    convolution = convolution.to(DEVICE, kind, memory_format=torch.channels_last)
    flops = 2 * 9 * channels * channels * 16 * 16 * images
    source = torch.empty(copied, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    gradient = torch.ones_like(block)

    def backward() -> None:
        block.requires_grad_()
        convolution(block).backward(gradient)

    def seconds(function: Callable[[], object]) -> float:
        return best_of(lambda: (function(), wait_for_device()))

    while True:
        with torch.no_grad():
            product = seconds(lambda: matrix @ matrix)
            forward = seconds(lambda: convolution(block.detach()))
            copy = seconds(lambda: target.copy_(source))
        both = seconds(backward)
        meter.tick(
            product_gflops=2 * side**3 / product / 1e9,
            convolution_gflops=flops / forward / 1e9,
            training_gflops=3 * flops / both / 1e9,
            copy_gbs=2 * copied / copy / 1e9,
        )


SUBJECTS: dict[str, Callable[[Meter, argparse.Namespace, bool], None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        *(bare, bare_kept, cifar_dist, cifar_dist_compiled, tutorials, accelerate),
        *(lightning, timm, airbench, ceilings),
    )
}


def main() -> None:
    """Run one subject until its stdin is closed."""
    parser = argparse.ArgumentParser("benchmarks.peers")
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--lean", action="store_true")
    parser.add_argument("--model", default="tutorial")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    add_options(parser)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    SUBJECTS[options.subject](Meter(options.steps, options.warmup), options, options.lean)


if __name__ == "__main__":
    main()
