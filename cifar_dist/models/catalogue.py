"""Build a network by name: shipped, torchvision, timm, or the user's own."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from cifar_dist.config import ModelConfig
from cifar_dist.errors import UsageError, one_line, require, require_known, suggest
from cifar_dist.models.deep import deep
from cifar_dist.models.residual import residual
from cifar_dist.models.resnet import resnet18, resnet34, resnet50
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.models.tutorial import tutorial, tutorial_relu, tutorial_wide
from cifar_dist.models.vgg import vgg16
from cifar_dist.user_code import UserCode, is_user_code, load

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
# Options of torchvision and timm that load weights. Some of them unpickle files.
LOADING = ("weights", "weights_backbone", "pretrained", "checkpoint_path", "pretrained_cfg")


def build_network(config: ModelConfig, num_classes: int, code: UserCode | None = None) -> nn.Module:
    """Return a new network that maps float [N, 3, H, W] to logits [N, num_classes].

    Its weights are random, from torch's global generator.

    Args:
        config: name, options and dropout of the network.
        num_classes: number of outputs.
        code: the user's network, if it has been imported already.

    Raises:
        UserCodeError: the user's class or function raised an exception.
        UsageError: the name is unknown, or the network does not accept an option.
    """
    if is_user_code(config.name) and code is None:
        code = load(config.name, "model.name")
    builder = code.object if code else _find_builder(config.name)
    parameters = inspect.signature(builder).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    takes_any = takes_any and getattr(builder, "__init__", None) is not nn.Module.__init__
    options = dict(config.options)
    if "num_classes" in parameters or takes_any:
        options.setdefault("num_classes", num_classes)
    if "dropout" in parameters and config.dropout is not None:
        options["dropout"] = config.dropout
    if not takes_any:
        _check_options(config.name, options, parameters)
    try:
        network = builder(**options)
    except Exception as error:
        if code:
            raise code.fail("model.name", error) from error
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise UsageError(
            f"{config.name} cannot be built with {given}: {one_line(error)}; see model.options"
        ) from error
    require(
        isinstance(network, nn.Module),
        f"model.name {config.name} returned {type(network).__name__}; expected a torch.nn.Module",
    )
    if config.dropout is not None:
        found = _set_dropout(network, config.dropout)
        require(
            found or not config.dropout,
            f"model.dropout is {config.dropout}, but {config.name} has no dropout layer",
        )
    return network


def _set_dropout(network: nn.Module, probability: float) -> bool:
    """Set the probability of every dropout layer; return whether there is one.

    0 also turns off stochastic depth.
    """
    found = False
    for layer in network.modules():
        if isinstance(layer, _DropoutNd):
            layer.p, found = probability, True
        elif isinstance(layer, nn.MultiheadAttention):
            layer.dropout, found = probability, True
        elif not probability and type(layer).__name__ == "StochasticDepth":  # torchvision
            layer.p = 0.0  # type: ignore[assignment]
        elif not probability and type(layer).__name__ == "DropPath":  # timm
            layer.drop_prob = 0.0  # type: ignore[assignment]
    return found


def _check_options(
    name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    for option in options:
        require_known(option, parameters, f"unknown option model.options.{option} of {name}")
    for key, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        require(
            not needed or key in options,
            f"{name} needs a value for {key}; give one with --model.options.{key}",
        )


def _find_builder(name: str) -> Callable[..., nn.Module]:
    library, slash, network = name.partition("/")
    if slash and library == "torchvision":
        return _torchvision(network)
    if slash and library == "timm":
        return _timm(network)
    if name not in MODELS:
        hint = suggest(name, list(MODELS))
        raise UsageError(
            f"unknown network '{name}'{hint}; others: torchvision/NAME, timm/NAME, FILE.py:NAME"
        )
    return MODELS[name]


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models(module=models)
    require_known(name, known, f"torchvision has no network '{name}'")
    return _without_weights(models.get_model_builder(name), "torchvision")


def _timm(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise UsageError(
            f"model.name timm/{name} needs timm; install it: pip install timm"
        ) from error
    known = timm.list_models()
    require_known(name.partition(".")[0], known, f"timm has no network '{name}'")
    return _without_weights(partial(timm.create_model, name), "timm")


def _without_weights(build: Callable[..., nn.Module], library: str) -> Callable[..., nn.Module]:
    """Return a builder that refuses the options by which a library loads weights."""

    def checked(**options: Any) -> nn.Module:
        for name in LOADING:
            require(
                options.get(name) in (None, False),
                f"model.options.{name} loads weights of {library}; remove it, and use "
                "model.weights",
            )
        return build(**options)

    return checked
