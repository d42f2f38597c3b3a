"""Networks known without torch: every name, shape and operation is that of the real one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cifar_dist.config import ModelConfig
from cifar_dist.launching.networks import NETWORKS, Features, Tape, describe_network
from cifar_dist.models.catalogue import MODELS

PLAIN = [(ModelConfig(name=name), 10, 32) for name in MODELS]
OTHERS = [(ModelConfig(name=name), 7, 45) for name in MODELS if name != "speednet"]
SHAPED = [
    (ModelConfig(name="speednet", widths=[32, 48], depth=4, stride=2, dropout=0.2), 5, 40),
    (ModelConfig(name="speednet", depth=1), 5, 32),
    (ModelConfig(name="tutorial", dropout=0.3), 5, 32),
    (ModelConfig(name="tutorial-relu", dropout=0.0), 5, 32),
]


def test_all_networks_are_known() -> None:
    assert NETWORKS.keys() == MODELS.keys()


@pytest.mark.parametrize(
    ("config", "classes", "side"),
    [*PLAIN, *OTHERS, *SHAPED],
    ids=lambda value: value.name if isinstance(value, ModelConfig) else str(value),
)
def test_a_described_network_is_the_real_one(config: ModelConfig, classes: int, side: int) -> None:
    names = ("dropout", "widths", "depth", "stride")
    options = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
    network = MODELS[config.name](classes, **options)
    described = describe_network(config, classes)
    weights = list(described.weights())
    assert {w.name: w.shape for w in weights} == {
        name: tuple(tensor.shape) for name, tensor in network.state_dict().items()
    }
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert [w.name for w in weights if w.trained] == trained  # the optimizer counts them
    assert sum(w.bytes for w in weights) == sum(t.nbytes for t in network.state_dict().values())

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = 2
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network(torch.randn(images, 3, side, side))
    tape = Tape()
    assert described.forward(Features(3, side), tape).size == classes
    assert tape.multiplications == counter.get_total_flops() / 2 / images
    really_kept = sum(size for place, size in kept.items() if place not in parameters) / images
    assert tape.kept_bytes == pytest.approx(really_kept, rel=0.02)
