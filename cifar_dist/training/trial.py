"""Try one batch before step 1, so that a network that cannot be trained is refused by name."""

from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode
from torch.utils.module_tracker import ModuleTracker

from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.storage.weights import describe_value
from cifar_dist.training.losses import Loss
from cifar_dist.user_code import UserCode

IMAGES = 2  # in the batch that is tried
# Functions that wait for the device and read a value on the host, which a CUDA graph cannot hold.
HOST_READS = {
    *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique"),
    *("__bool__", "__int__", "__float__", "__index__"),
}


def try_network(
    accelerator: Accelerator,
    network: nn.Module,
    name: str,
    code: UserCode | None,
    num_classes: int,
    image_size: int,
) -> str:
    """Run the network forward and backward on random images; afterwards it is as it was.

    Args:
        network: on its device, without DDP.
        name: of the network, for messages.
        code: the user's, if the network is.

    Returns:
        Name of the first module whose code reads a tensor's value on the host, or "".

    Raises:
        UserCodeError: the user's code raised an exception.
        UsageError: the network cannot process such images, returns something else than logits
            [N, num_classes], has trainable parameters without gradient, or holds a state that
            safetensors cannot store.
    """
    device = accelerator.device
    shape = (IMAGES, 3, image_size, image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    network.train()
    if any(isinstance(value, UninitializedParameter) for value in network.parameters()):
        with torch.no_grad():  # lazy layers draw their weights now, from the seeded generator
            _forward(accelerator, network, images, name, code)
    buffers = [buffer.clone() for buffer in network.buffers()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), ModuleTracker() as tracker:
        with _HostReads(tracker) as reads:
            logits = _forward(accelerator, network, images, name, code)
        _check_logits(logits, name, num_classes, image_size)
        parameters = {n: p for n, p in network.named_parameters() if p.requires_grad}
        require(len(parameters) > 0, f"model.name {name} has no trainable parameters")
        require(
            logits.requires_grad,
            f"model.name {name} returned logits without gradient; remove torch.no_grad() and "
            "detach() from forward",
        )
        logits.float().sum().backward()
    unused = [n for n, parameter in parameters.items() if parameter.grad is None]
    if unused:
        more = f", nor do {len(unused) - 1} more" if len(unused) > 1 else ""
        raise UsageError(
            f"model.name {name}: parameter {unused[0]} gets no gradient{more}; use it in forward, "
            "remove it, or call requires_grad_(False) on it"
        )
    network.zero_grad()
    with torch.no_grad():
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    for key, value in network.state_dict().items():
        require(
            isinstance(value, torch.Tensor) and _is_storable(value.dtype),
            f"model.name {name}: the state {key} is {describe_value(value)}, which safetensors "
            "cannot store; register tensors only",
        )
    return reads.module


def try_loss(loss: Loss, code: UserCode, num_classes: int, device: torch.device) -> None:
    """Compute the user's loss for a batch.

    Raises:
        UserCodeError: it raised an exception.
        UsageError: it does not return the loss per image, float [N].
    """
    logits = torch.zeros(IMAGES, num_classes, device=device, requires_grad=True)
    targets = torch.zeros(IMAGES, dtype=torch.int64, device=device)
    try:
        losses: Any = loss.per_image(logits, targets)
    except Exception as error:
        raise code.fail("train.loss", error) from error
    require(
        isinstance(losses, torch.Tensor) and tuple(losses.shape) == (IMAGES,),
        f"train.loss {code.place} returned {describe_value(losses)} for {IMAGES} images; expected "
        f"the loss per image, [{IMAGES}] (reduction='none')",
    )
    require(losses.requires_grad, f"train.loss {code.place} has no gradient")


def _forward(
    accelerator: Accelerator,
    network: nn.Module,
    images: torch.Tensor,
    name: str,
    code: UserCode | None,
) -> torch.Tensor:
    try:
        with accelerator.autocast():
            logits: torch.Tensor = network(images)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if code:
            raise code.fail("model.name", error) from error
        side = images.shape[-1]
        raise UsageError(
            f"{name} cannot process {side}x{side} images: {one_line(error)}; choose another "
            "data.image_size"
        ) from error
    return logits


def _check_logits(logits: Any, name: str, num_classes: int, image_size: int) -> None:
    require(
        isinstance(logits, torch.Tensor),
        f"model.name {name} returned {describe_value(logits)} in training; expected one tensor of "
        "logits [N, classes]; turn off auxiliary outputs, as with model.options.aux_logits false",
    )
    shape = list(logits.shape)
    require(
        len(shape) == 2 and shape[0] == IMAGES,
        f"model.name {name} returned {shape} for {IMAGES} images of {image_size}x{image_size} "
        f"pixels; expected logits [{IMAGES}, {num_classes}]",
    )
    require(
        shape[1] == num_classes,
        f"model.name {name} returned {shape[1]} logits per image, but the dataset has "
        f"{num_classes} classes; give the network an argument num_classes, or set its width with "
        "model.options",
    )


class _HostReads(TorchFunctionMode):
    """Notes the module that first calls one of HOST_READS."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self._tracker = tracker
        self.module = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.module and getattr(function, "__name__", "") in HOST_READS:
            self.module = max(self._tracker.parents, key=len)
        return function(*args, **(kwargs or {}))


def _is_storable(dtype: torch.dtype) -> bool:
    try:
        safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    except (KeyError, ValueError, SafetensorError):
        return False
    return True


@torch.no_grad()
def require_batchnorm_values(network: nn.Module, images: int, image_size: int) -> None:
    """Refuse training in which BatchNorm would normalise over a single value per channel.

    Args:
        network: with BatchNorm of its own process, not synchronised.
        images: of each process and forward pass.
        image_size: side of the images, in pixels.

    Raises:
        UsageError: naming the layer.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    layers = {name: layer for name, layer in network.named_modules() if type(layer) in kinds}
    if images > 1 or not layers:
        return

    def check(name: str, features: torch.Tensor) -> None:
        require(
            features.numel() > features.shape[1],
            f"BatchNorm layer {name} would normalise over a single value per channel, as each "
            "process trains on 1 image at a time; give a larger train.batch_size, a smaller "
            "train.accumulate, or fewer processes",
        )

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: check(name, inputs[0]))
        for name, layer in layers.items()
    ]
    network.eval()  # keeps its statistics
    device = next(network.parameters()).device
    network(torch.zeros(images, 3, image_size, image_size, device=device))
    for handle in handles:
        handle.remove()
    network.train()
