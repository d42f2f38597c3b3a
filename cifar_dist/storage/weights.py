"""Load weights from a safetensors file or a checkpoint into a network: all that fit, or none."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from cifar_dist.config import local_path
from cifar_dist.errors import UsageError, one_line, require
from cifar_dist.models.catalogue import build_network
from cifar_dist.storage.checkpoint import Progress, Tensors, find_weights, read_tensors
from cifar_dist.user_code import from_object, identity, is_user_code, load_all, require_same

SHOWN = 3  # names of each kind in a message
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # converted to each other


def load_weights(network: nn.Module, place: str) -> bool:
    """Copy the weights at `place` into `network`.

    The head, which is the last Linear or Conv2d layer, stays new where it is missing there or of
    another shape, as for another number of classes. Every other tensor must be there, and nothing
    else.

    Args:
        place: a safetensors file, a run folder (its newest checkpoint is meant) or one checkpoint's
            folder; averaged weights where it has them.

    Returns:
        Whether the head stayed new.

    Raises:
        UsageError: there are no weights, or they do not fit; the network is as it was.
    """
    given, own = _read(place), network.state_dict()
    layers = [n for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    head = {name for name in own if name.rpartition(".")[0] in layers[-1:]}
    head_is_new = any(name not in given or given[name].shape != own[name].shape for name in head)
    if head_is_new:
        given = given | {name: own[name] for name in head}
    faults = {
        "it lacks": [name for name in own if name not in given],
        "it has unknown": [name for name in given if name not in own],
        "it differs in": [
            f"{name} ({describe_value(given[name])} there, {describe_value(tensor)} here)"
            for name, tensor in own.items()
            if name in given and not _fits(given[name], tensor)
        ],
    }
    parts = [f"{what} {name_some(names)}" for what, names in faults.items() if names]
    require(
        not parts,
        f"the weights in '{place}' are not of this network: {'; '.join(parts)}; choose the "
        "model.name that they were trained with",
    )
    network.load_state_dict(given)
    return head_is_new


def name_some(names: list[str]) -> str:
    """Return the first few tensor names on one line, escaped because they may come from a file."""
    shown = ", ".join(ascii(name)[1:-1][:80] for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _read(place: str) -> Tensors:
    path = local_path(place)
    if path.is_dir():
        return find_weights(place)[1][1]
    require(
        path.is_file(),
        f"model.weights '{place}' does not exist; name a safetensors file, a run folder or a "
        "checkpoint",
    )
    try:
        return read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"model.weights '{place}' is not a whole safetensors file ({one_line(error)}); if "
            f"torch.save wrote it, run: cifar-dist convert {place} OUT.safetensors"
        ) from error


def _fits(given: torch.Tensor, own: torch.Tensor) -> bool:
    same_kind = given.dtype == own.dtype or {given.dtype, own.dtype} <= set(FLOATS)
    return given.shape == own.shape and same_kind


def describe_value(value: Any) -> str:
    """Return dtype and shape of a tensor, or else the type: "float32 [2, 3]"."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def restore_network(
    progress: Progress, weights: Tensors, path: Path, model: Any = None
) -> nn.Module:
    """Return the network of a checkpoint with these weights, ready to evaluate.

    Args:
        path: of the checkpoint, for messages.
        model: the network's name, or the user's class or function. Code of the user's own must be
            given: it is not imported because a checkpoint names it.

    Raises:
        UserCodeError: the user's code raised an exception.
        UsageError: the user's code is not named or has changed, or the weights do not fit.
    """
    recipe = progress.recipe
    recorded = recipe.model.name
    if model is None or isinstance(model, str):
        name, codes = model, load_all({"model.name": model})
    else:
        codes = {"model.name": from_object(model)}
        name = codes["model.name"].place
    if is_user_code(recorded):
        own = identity(recorded)
        require(
            name is not None,
            f"the network {own} of {path} is code of its user's; name the code again: "
            f"--model.name {own}",
        )
        require_same(progress.code, codes, str(path))
    require(
        name is None or identity(name) == identity(recorded),
        f"{path} was trained with the network {identity(recorded)}, not {name}",
    )
    network = build_network(recipe.model, len(progress.classes), codes.get("model.name"))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = one_line(error)
        raise UsageError(
            f"the weights do not fit the model {recipe.model.name}: {reason}"
        ) from error
    if recipe.train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    return network.eval()
