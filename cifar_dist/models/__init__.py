"""Architectures by name; one family a file, each for any image size and number of classes."""

from collections.abc import Callable

from torch import nn

from cifar_dist.config import ModelConfig
from cifar_dist.models.deep import deep
from cifar_dist.models.residual import residual
from cifar_dist.models.resnet import resnet18, resnet34, resnet50
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.models.tutorial import tutorial, tutorial_relu, tutorial_wide
from cifar_dist.models.vgg import vgg16
from cifar_dist.models.winograd import use_winograd

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
    network = MODELS[config.name](classes, **chosen)
    use_winograd(network)
    return network
