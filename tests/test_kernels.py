"""Fused kernels compared with plain torch, in Triton's interpreter if there is no GPU."""

import copy
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist import speedups
from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment
from cifar_dist.data.augment import Pixels
from cifar_dist.data.batches import Batch
from cifar_dist.models.speednet import Block, SpeedNet
from tests.helpers import run_command

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton")
from cifar_dist.speedups import augment_kernel, speednet_kernels  # noqa: E402


def norm_of(channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.4).to(DEVICE)
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean):
            values.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def one_by_one(features: torch.Tensor, layer: nn.BatchNorm2d, pool: bool) -> torch.Tensor:
    return functional.gelu(layer(functional.max_pool2d(features, 2) if pool else features))


CASES = [  # shape, pool: even and odd sizes; channels for less than one tile, and for several
    ((3, 24, 8, 8), True),
    ((3, 24, 7, 5), True),
    ((2, 96, 4, 4), False),
    ((5, 8, 3, 3), False),
    ((40, 70, 9, 9), True),
]


@pytest.mark.parametrize(("shape", "pool"), CASES)
def test_training_equals_the_layers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], pool: bool
) -> None:
    monkeypatch.setattr(speednet_kernels, "PROGRAMS", 5)  # so that each program adds several tiles
    torch.manual_seed(0)
    features = (2 * torch.randn(shape, device=DEVICE) + 3).contiguous(
        memory_format=torch.channels_last
    )
    found = {}
    for name in ("expected", "ours"):
        layer, inputs = norm_of(shape[1]), features.clone().requires_grad_()
        function = one_by_one if name == "expected" else speednet_kernels.pool_normalise_activate
        outputs = function(inputs, layer, pool)
        torch.manual_seed(2)
        outputs.backward(torch.randn(outputs.shape, device=DEVICE))
        found[name] = [outputs, inputs.grad, layer.weight.grad, layer.bias.grad]
        found[name] += [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    for expected, ours in zip(found["expected"], found["ours"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "pool"), CASES)
def test_evaluation_equals_the_layers(shape: tuple[int, ...], pool: bool) -> None:
    layer, features = norm_of(shape[1]).eval(), torch.randn(shape, device=DEVICE)
    ours = speednet_kernels.pool_normalise_activate(features, layer, pool)
    torch.testing.assert_close(ours, one_by_one(features, layer, pool), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_does_not_lose_precision() -> None:
    features = torch.randn(16, 8, 6, 6, device=DEVICE) + 1000
    layer, reference = norm_of(8), norm_of(8).double()
    ours = speednet_kernels.pool_normalise_activate(features, layer, False)
    expected = one_by_one(features.double(), reference, False)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


def test_nan_is_propagated() -> None:
    for place in range(4):
        features = torch.randn(2, 4, 4, 4, device=DEVICE)
        features[1, 2, 2 + place // 2, place % 2] = torch.nan
        features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
        outputs = speednet_kernels.pool_normalise_activate(features, norm_of(4), True)
        outputs.sum().backward()
        for values in (outputs, features.grad):
            assert values is not None
            bad = values.isnan().flatten(2).any(dim=2).any(dim=0)
            assert bad.tolist() == [False, False, True, False]


@pytest.mark.parametrize("stride", [1, 2])
def test_whitening_equals_a_convolution(stride: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 9, 8, device=DEVICE)
    whitening = nn.Conv2d(3, 24, 2, stride, device=DEVICE).requires_grad_(False)
    expected = functional.gelu(whitening(images))
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = speednet_kernels.whiten_activate(images.contiguous(memory_format=layout), whitening)
        error = 1e-4 if DEVICE == "cpu" else 1e-2  # TF32
        torch.testing.assert_close(ours[:, :24], expected, rtol=error, atol=error)
        assert not ours[:, 24:].any()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert speednet_kernels.whiten_activate(images, whitening).dtype == torch.bfloat16


PIXELS = Pixels((0.5,) * 3, (0.25,) * 3, AugmentConfig(), seed=0)


class OwnNetwork(nn.Module):
    """A user's network that contains a block of speednet."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(3), nn.Linear(3, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.block(images).amax((2, 3)))
        return logits


def plain_and_fast(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, nn.Module]:
    """Return the network unchanged, and a copy with kernels."""
    monkeypatch.setattr(speedups, "runs_triton", lambda _: True)
    plain = network.to(DEVICE, memory_format=torch.channels_last)
    return plain, speedups.speed_up(copy.deepcopy(plain), PIXELS)[0]


def gradients(network: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Return the gradients of the weights, and of the images if they require one."""
    network.zero_grad()
    functional.cross_entropy(network(images), torch.arange(len(images), device=DEVICE)).backward()
    named = {name: parameter.grad for name, parameter in network.named_parameters()}
    return named | {"images": images.grad}


@pytest.mark.parametrize("network", [SpeedNet(10, (4, 8), depth=3), OwnNetwork()])
def test_a_network_with_kernels_gives_the_same_results(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fast = plain_and_fast(network, monkeypatch)
    average = copy.deepcopy(fast)  # as AveragedModel does
    images, error = torch.randn(4, 3, 8, 8, device=DEVICE), {"rtol": 1e-3, "atol": 1e-4}

    def evaluate(network: nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = network.eval()(images)
        network.train()
        return logits

    initial = evaluate(plain)
    torch.testing.assert_close(gradients(fast, images), gradients(plain, images), **error)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict(), **error)
    torch.testing.assert_close(evaluate(fast), evaluate(plain), **error)
    torch.testing.assert_close(evaluate(average), initial, **error)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_images_are_not_lost(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are needed for attribution, and for fine-tuning with layers in evaluation mode."""
    plain, fast = plain_and_fast(SpeedNet(10, (4, 8)).train(training), monkeypatch)
    images = torch.randn(4, 3, 8, 8, device=DEVICE)
    found = [gradients(network, images.clone().requires_grad_()) for network in (plain, fast)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_tracing_and_compiling_capture_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = plain_and_fast(SpeedNet(10, (4, 8)).eval(), monkeypatch)
    images = torch.randn(2, 3, 8, 8, device=DEVICE)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit, which TensorBoard uses, is deprecated
        traced = torch.jit.trace(fast, images)
        compiled = torch.compile(fast, backend="eager")
        expected = plain(images)
        assert not torch.equal(fast(images), expected)  # the kernels round differently
        torch.testing.assert_close(traced(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(compiled(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("capability", [75, 90])
@pytest.mark.slow
def test_kernels_compile_for_gpus_once_for_all_sizes(capability: int, tmp_path: Path) -> None:
    done = run_command(
        [sys.executable, "-m", "tests.absent_gpu", str(capability)],
        TRITON_INTERPRET="0",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    expected = {"_augment": 1, "_finish_statistics": 1, "_sum_gradients": 1, "_whiten": 1}
    expected |= dict.fromkeys(("_normalise", "_pass_back", "_pool_and_sum"), 2)  # pooling or not
    assert dict(line.split() for line in done.stdout.splitlines()) == {
        name: str(times) for name, times in expected.items()
    }


COMBINED = [
    AugmentConfig(),
    AugmentConfig(flip="alternating", translate=3, padding="zero"),
    AugmentConfig(flip="alternating", cutout=3, grayscale=0.5),
    AugmentConfig(translate=1, padding="zero", cutout=2, grayscale=0.3),
]


SOME = {int: (2,), float: (0.5,), bool: (True,)}


def one_at_a_time() -> list[AugmentConfig]:
    """Return one config per value of each enumerated field, and one per other field."""
    types, configs = get_type_hints(AugmentConfig), []
    for field in dataclasses.fields(AugmentConfig):
        values = get_args(types[field.name]) or SOME[types[field.name]]
        base = AugmentConfig(translate=2) if field.name == "padding" else AugmentConfig()
        configs += [dataclasses.replace(base, **{field.name: value}) for value in values]
    return configs


def training_batches(config: AugmentConfig) -> list[torch.Tensor]:
    """Return the augmented pixels of a batch in three epochs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 9, 9, 3), dtype=torch.uint8, generator=generator)
    positions = torch.randint(0, 2**33, (20,), generator=generator)
    batch = Batch(images.to(DEVICE), torch.zeros(20), positions.to(DEVICE))
    pixels = Pixels((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), config, seed=2**40 + 3)
    _, pixels = speedups.speed_up(nn.Linear(1, 1).to(DEVICE), pixels)
    return [pixels.for_training(batch, epoch) for epoch in range(3)]


def compare_augmentation(config: AugmentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_kernel, "PIXELS", 64)  # so that an image takes two programs
    monkeypatch.setattr(speedups, "runs_triton", lambda _: False)
    plain = training_batches(config)
    monkeypatch.setattr(speedups, "runs_triton", lambda _: True)
    for ours, expected in zip(training_batches(config), plain, strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("config", [*one_at_a_time(), *COMBINED])
def test_augmentation_is_bit_identical(
    config: AugmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_augmentation(config, monkeypatch)


def test_an_augmentation_without_a_kernel_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithInversion(AugmentConfig):
        invert: bool = False

    plain = augment.augment

    def augment_and_invert(batch: Batch, config: WithInversion, *draws: int) -> Any:
        images, mask = plain(batch, config, *draws)
        return 255 - images if config.invert else images, mask

    monkeypatch.setattr(augment, "augment", augment_and_invert)
    compare_augmentation(WithInversion(flip="random", invert=True), monkeypatch)
