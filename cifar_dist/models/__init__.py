"""Architectures by name; one family a file, each for any image size and number of classes."""

from collections.abc import Callable

import torch
from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.errors import require
from cifar_dist.models.deep import deep
from cifar_dist.models.residual import residual
from cifar_dist.models.resnet import resnet18, resnet34, resnet50
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.models.tutorial import tutorial, tutorial_relu, tutorial_wide
from cifar_dist.models.vgg import vgg16

# Each takes the number of classes and the probability of dropout; speednet, its shape too.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "tutorial": tutorial,
    "tutorial-wide": tutorial_wide,
    "tutorial-relu": tutorial_relu,
    "deep": deep,
    "residual": residual,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "speednet": SpeedNet,
}


def build_model(config: ModelConfig, classes: int) -> nn.Module:
    """Return a new model whose initial weights come from torch's global generator.

    It maps float [N, 3, H, W] to logits [N, classes].
    """
    options = {name: getattr(config, name) for name in ("dropout", "widths", "depth", "stride")}
    chosen = {name: value for name, value in options.items() if value is not None}
    return MODELS[config.name](classes, **chosen)


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
