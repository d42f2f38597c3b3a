"""The costs of networks: known figures, what forces a network onto the CPU, and refusals."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cifar_dist.errors import UsageError
from cifar_dist.models.catalogue import MODELS
from cifar_dist.models.costs import Costs, measure

# Trained parameters, multiplications of one 32x32 image, and bytes kept for its backward pass.
KNOWN = {
    "tutorial": (145_578, 12_354_176, 327_936),
    "deep": (5_228_938, 209_928_832, 2_348_288),
    "residual": (5_403_082, 216_416_896, 2_848_000),
    "vgg16": (33_726_378, 389_619_712, 3_319_808),
    "resnet18": (11_173_962, 555_422_720, 4_700_160),
    "speednet": (1_971_328, 118_147_360, 1_557_856),
}


def of(costs: Costs) -> tuple[int, int]:
    return sum(p.numel() for p in costs.network.parameters()), costs.multiplications


@pytest.mark.parametrize("name", KNOWN)
def test_known_networks(name: str) -> None:
    parameters, multiplications, activations = KNOWN[name]
    costs = measure(name, lambda: MODELS[name](10), 32)
    trained = [p for p in costs.network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == parameters
    assert all(p.is_meta for p in costs.network.parameters())
    assert (costs.outputs, costs.multiplications) == (10, multiplications)
    assert costs.activations == pytest.approx(activations, rel=0.01)


class Attention(nn.Module):
    """A depthwise convolution and attention over its 8x8 places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        places = self.norm(self.depthwise(self.stem(images)).flatten(2).transpose(1, 2))
        logits: torch.Tensor = self.head(self.attention(places, places, places)[0].mean(dim=1))
        return logits


class ReadsValues(Attention):
    """The same, which asks for a value in the forward pass."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * (1.0 if images.sum().item() < 1 else 2.0)


class BuiltFromValues(Attention):
    """The same, which asks for a value while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.linspace(0, 0.1, 4).tolist()


def test_attention_and_depthwise_convolutions_are_counted() -> None:
    costs = measure("attention", Attention, 8)
    projections = 64 * 8 * (3 * 8 + 8)
    products = 2 * 64 * 64 * 8
    assert of(costs) == (
        *(4 * 8 + 10 * 8 + 16 + (24 + 8) * 8 + 32 + 90,),
        *(64 * 8 * (3 + 9) + projections + products + 80,),
    )


@pytest.mark.parametrize("build", [ReadsValues, BuiltFromValues])
def test_a_network_that_needs_values_is_measured_on_the_cpu(build: Callable[[], nn.Module]) -> None:
    costs, expected = measure("mine", build, 8), measure("attention", Attention, 8)
    assert of(costs)[0] == of(expected)[0]
    assert costs.outputs == expected.outputs
    assert costs.activations > 0
    assert all(p.is_meta for p in costs.network.parameters())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 9)), "mine cannot process 8x8 images: Calculated padded"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "mine cannot process 8x8 images: mat1"),
        (nn.Conv2d(3, 4, 1), "mine returns a tensor [2, 4, 8, 8] for 2 images in training mode"),
        (nn.LSTM(8, 4), "mine cannot process 8x8 images: LSTM: Expected input to be 2D or 3D"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(network: nn.Module, message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        measure("mine", lambda: network, 8)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_all_classification_networks_of_torchvision_are_measured_or_refused() -> None:
    from torchvision import models

    refused = {}
    for name in models.list_models(module=models):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a slow initialisation
            try:
                costs = measure(name, lambda: models.get_model(name, num_classes=7), 32)  # noqa: B023
            except UsageError as error:
                refused[name] = str(error)
                continue
        assert costs.outputs == 7, name
        assert min(costs.multiplications, costs.activations) > 0, name
    assert refused.keys() == {
        *("alexnet", "googlenet", "inception_v3", "maxvit_t"),
        *("vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"),
    }
    assert refused["vit_b_16"] == (
        "vit_b_16 cannot process 32x32 images: Wrong image height! Expected 224 but got 32!"
    )
    assert refused["googlenet"].startswith("googlenet returns GoogLeNetOutputs for 2 images")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size", "parameters"),
    [("vit_tiny_patch16_224", 224, 5_526_346), ("convnext_atto", 32, 3_377_730)],
)
def test_networks_of_timm_are_measured(name: str, image_size: int, parameters: int) -> None:
    timm = pytest.importorskip("timm")
    costs = measure(name, lambda: timm.create_model(name, num_classes=10), image_size)
    assert costs.outputs == 10
    assert of(costs)[0] == parameters
