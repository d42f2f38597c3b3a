"""Measure what any network holds and what a training step of it takes, without training it.

The network is built on the meta device, where tensors have shapes and no values, and run once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.errors import UsageError, one_line, require

IMAGES = 2  # BatchNorm refuses a single value per channel


@dataclass(frozen=True)
class Costs:
    """What a network holds, and what the forward pass of one image takes in training mode.

    Attributes:
        network: on the meta device: names, shapes and types of all tensors, without values.
        outputs: number of logits of an image.
        multiplications: of convolutions, linear layers and attention, each with its addition.
        activations: bytes kept for the backward pass, without parameters and buffers.
    """

    network: nn.Module
    outputs: int
    multiplications: int
    activations: int


def measure(name: str, build: Callable[[], nn.Module], image_size: int) -> Costs:
    """Measure the network that `build` returns.

    Args:
        name: of the network, for error messages.
        build: is called once or twice; called again on the CPU if it needs values of tensors.
        image_size: side of the images, in pixels.

    Raises:
        UsageError: the network cannot process images of this size, or does not return logits.
    """
    try:
        with torch.device("meta"):
            network = build()
    except Exception:  # computes with values, or fails on any device
        network = build().to("meta")
    try:
        try:
            return _run(name, network, torch.device("meta"), image_size)
        except (RuntimeError, TypeError):  # as operations raise that need values
            return _run(name, build(), torch.device("cpu"), image_size)
    except UsageError:
        raise
    except Exception as error:
        reason = one_line(error, None) or type(error).__name__
        raise UsageError(
            f"{name} cannot process {image_size}x{image_size} images: {reason}"
        ) from error


def _run(name: str, network: nn.Module, device: torch.device, image_size: int) -> Costs:
    images = torch.zeros(IMAGES, 3, image_size, image_size, device=device)
    if any(isinstance(value, UninitializedParameter) for value in network.parameters()):
        network(images)  # lazy layers get their shapes
    tensors = [*network.parameters(), *network.buffers()]
    held = {id(storage): storage for storage in (t.untyped_storage() for t in tensors)}
    kept: dict[int, torch.UntypedStorage] = {}  # several layers may keep the same one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in held:
            kept[id(storage)] = storage
        return tensor

    network.train()
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        logits = network(images)
    is_tensor = isinstance(logits, torch.Tensor)
    found = f"a tensor {list(logits.shape)}" if is_tensor else type(logits).__name__
    require(
        is_tensor and logits.dim() == 2 and len(logits) == IMAGES,
        f"{name} returns {found} for {IMAGES} images in training mode; expected logits "
        f"[{IMAGES}, classes]",
    )
    return Costs(
        network=network.to("meta"),
        outputs=logits.shape[1],
        multiplications=counter.get_total_flops() // 2 // IMAGES,
        activations=sum(storage.nbytes() for storage in kept.values()) // IMAGES,
    )
