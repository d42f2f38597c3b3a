"""Compile every kernel for a GPU that is absent: `python -m tests.absent_gpu CAPABILITY`.

Runs training steps and evaluations of speednet without executing a kernel. Prints how often each
kernel was compiled for a GPU of that compute capability (90 is an H100).
"""

import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cifar_dist import speedups
from cifar_dist.config import AugmentConfig
from cifar_dist.data.augment import Pixels
from cifar_dist.data.batches import Batch
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.training.engine import VIEWS, view


class AbsentGPU:
    """Triton's driver for a GPU that only exists for the compiler."""

    def get_current_target(self) -> GPUTarget:
        """Return the GPU that kernels are compiled for."""
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        """Return the index of the GPU."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


def main() -> None:
    """Compile the kernels and print the counts."""
    driver.set_active(AbsentGPU())
    run, compiled = JITFunction.run, set()

    def compile_only(kernel: Any, *arguments: Any, warmup: bool, **named: Any) -> Any:
        result = run(kernel, *arguments, warmup=True, **named)
        compiled.add((kernel.fn.__name__, result.hash))
        return result

    augment = AugmentConfig(flip="random", translate=2, cutout=4, grayscale=0.1)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(speedups, "runs_triton", return_value=True),
        torch.autocast("cpu", torch.bfloat16),
    ):
        network, pixels = speedups.speed_up(
            SpeedNet(10).to(memory_format=torch.channels_last),
            Pixels((0.5,) * 3, (0.25,) * 3, augment, seed=1),
        )
        for count in (3, 16):
            batch = Batch(
                torch.zeros(count, 32, 32, 3, dtype=torch.uint8),
                torch.zeros(count, dtype=torch.int64),
                torch.arange(count),
            )
            network.train()(pixels.for_training(batch, 0)).sum().backward()
            images = pixels.for_evaluation(batch.images)
            with torch.no_grad():
                for _, *how in VIEWS["flip_shift"]:
                    network.eval()(view(images, *how))
    for name, times in sorted(Counter(name for name, _ in compiled).items()):
        print(name, times)


if __name__ == "__main__":
    main()
