"""Shipped networks: parameter counts, image sizes, numbers of classes, and references."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist.config import ModelConfig
from cifar_dist.launching.plan import main as plan
from cifar_dist.models.catalogue import MODELS, build_network
from cifar_dist.models.layers import AveragePool
from cifar_dist.models.speednet import SpeedNet
from cifar_dist.train import main as train
from tests.helpers import TINY

# Weights and biases, counted from the tables in the papers and tutorials.
PARAMETERS = {
    "tutorial": 145_578,
    "tutorial-wide": 637_610,
    "tutorial-relu": 637_610,
    "deep": 5_228_938,
    "residual": 5_403_082,
    "vgg16": 33_726_378,
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "speednet": 1_972_792,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str) -> None:
    model = build_network(ModelConfig(name=name), 10)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    "name",
    ["tutorial", "tutorial-relu", "deep", "residual", "vgg16", "resnet18", "resnet50", "speednet"],
)
@pytest.mark.parametrize("size", [5, 28, 48])
def test_any_image_size_and_class_count(name: str, size: int) -> None:
    model = build_network(ModelConfig(name=name), 7)
    logits = model(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_tutorial_network_equals_that_of_the_tutorials() -> None:
    reference = torch.nn.Sequential(
        *(torch.nn.Conv2d(3, 32, 5, padding=2), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(32, 32, 5, padding=2), torch.nn.MaxPool2d(2)),
        *(torch.nn.Conv2d(32, 64, 5, padding=2), torch.nn.MaxPool2d(2)),
        *(torch.nn.Flatten(), torch.nn.Linear(1024, 64), torch.nn.Linear(64, 10)),
    )
    model = build_network(ModelConfig(name="tutorial"), 10)
    reference.load_state_dict(
        dict(zip(reference.state_dict(), model.state_dict().values(), strict=True))
    )
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(images), reference(images))


def test_speednet_equals_the_network_of_its_paper() -> None:
    """Compare with airbench94, except for the trained bias of its first layer."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        def normalise() -> nn.Module:
            return nn.BatchNorm2d(outputs, eps=1e-12, momentum=1 - 0.6)

        first = [nn.Conv2d(inputs, outputs, 3, padding="same", bias=False), nn.MaxPool2d(2)]
        second = [nn.Conv2d(outputs, outputs, 3, padding="same", bias=False)]
        return [*first, normalise(), nn.GELU(), *second, normalise(), nn.GELU()]

    widths = (8, 16, 16)
    head = nn.Linear(16, 10, bias=False)
    reference = nn.Sequential(
        nn.Conv2d(3, 24, 2), nn.GELU(), *block(24, 8), *block(8, 16), *block(16, 16)
    )
    model = SpeedNet(10, widths)
    values = list(model.state_dict().values())
    reference.load_state_dict(dict(zip(reference.state_dict(), values[:-1], strict=True)))
    head.load_state_dict({"weight": values[-1]})

    def logits(images: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = head(reference(images).amax((2, 3))) / 16
        return scaled

    for training in (True, True, False):
        images = torch.randn(4, 3, 32, 32)
        reference.train(training)
        torch.testing.assert_close(model.train(training)(images), logits(images))


def test_dropout_can_be_set_or_left_to_the_network() -> None:
    def probabilities(config: ModelConfig) -> set[float]:
        modules = build_network(config, 10).modules()
        return {m.p for m in modules if isinstance(m, torch.nn.Dropout)}

    assert probabilities(ModelConfig(name="residual")) == {0.4}
    assert probabilities(ModelConfig(name="residual", dropout=0.1)) == {0.1}
    assert probabilities(ModelConfig(name="tutorial")) == set()
    assert probabilities(ModelConfig(name="tutorial", dropout=0.3)) == {0.3}


@pytest.mark.parametrize("size", [2, 4, 5, 8, 9])
@pytest.mark.parametrize("side", [1, 2, 4])
def test_average_pooling_equals_torch(size: int, side: int) -> None:
    images = torch.randn(2, 3, size, size + 4)
    pooled = AveragePool(side)(images)
    torch.testing.assert_close(pooled, nn.AdaptiveAvgPool2d(side)(images))


def test_whitened_outputs_are_uncorrelated_over_all_images() -> None:
    torch.manual_seed(0)
    images = torch.randn(1200, 3, 8, 8).cumsum(dim=3)  # correlated neighbours
    images[500:] *= torch.tensor([3.0, 1.0, 0.5])[:, None, None]  # other statistics
    network = SpeedNet(10)
    network.initialise_from(images)
    filters, stride = network.whitening.weight, network.whitening.stride
    filtered = functional.conv2d(images, filters, stride=stride).transpose(0, 1).flatten(1)
    first, opposite = filtered.double().chunk(2)
    assert torch.equal(first, -opposite)
    assert torch.equal(network.whitening.get_parameter("bias"), torch.ones(24))
    torch.testing.assert_close(
        first @ first.T / first.shape[1], torch.eye(12, dtype=torch.double), rtol=0, atol=0.01
    )


@pytest.mark.fault(73)
def test_batchnorm_over_a_single_value_is_refused_before_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.name", "vgg16", "--data.image_size", "16", "--train.batch_size", "1"]
    options = [*TINY, *options, "--data.limit_train", "3", "--out", str(tmp_path / "run")]
    message = (
        "error: BatchNorm layer 24.1 would normalise over a single value per channel, as each "
        "process trains on 1 image at a time; give a larger train.batch_size"
    )
    assert train(options) == 2
    assert capfd.readouterr().err.startswith(message)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert plan(options) == 2
    assert capfd.readouterr().err.startswith(message)


def test_batchnorm_over_one_image_of_several_pixels_trains(tmp_path: Path) -> None:
    options = ["--model.name", "deep", "--data.image_size", "32", "--train.batch_size", "1"]
    options = [*TINY, *options, "--data.limit_train", "2", "--data.limit_test", "2"]
    assert train([*options, "--train.epochs", "1", "--out", str(tmp_path / "run")]) == 0
