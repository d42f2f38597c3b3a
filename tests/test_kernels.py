"""Our kernels against what they stand for, in Triton's interpreter where there is no GPU."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional

from cifar_dist import speedups as kernels
from cifar_dist.config import AugmentConfig
from cifar_dist.data import augment
from cifar_dist.data.augment import Pixels
from cifar_dist.data.batches import Batch
from tests.helpers import run_command

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton")
from cifar_dist.speedups import augmentation, layers  # noqa: E402


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


CASES = [  # shape, pool: even and odd sides, channels that fill no tile, one that fills several
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
    monkeypatch.setattr(layers, "PROGRAMS", 5)  # so that programs add up several tiles
    torch.manual_seed(0)
    features = (2 * torch.randn(shape, device=DEVICE) + 3).contiguous(
        memory_format=torch.channels_last
    )
    found = {}
    for name in ("expected", "ours"):
        layer, inputs = norm_of(shape[1]), features.clone().requires_grad_()
        function = one_by_one if name == "expected" else layers.pool_normalise_activate
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
    ours = layers.pool_normalise_activate(features, layer, pool)
    torch.testing.assert_close(ours, one_by_one(features, layer, pool), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    features = torch.randn(16, 8, 6, 6, device=DEVICE) + 1000
    layer, reference = norm_of(8), norm_of(8).double()
    ours = layers.pool_normalise_activate(features, layer, False)
    expected = one_by_one(features.double(), reference, False)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_stays_so() -> None:
    for place in range(4):
        features = torch.randn(2, 4, 4, 4, device=DEVICE)
        features[1, 2, 2 + place // 2, place % 2] = torch.nan
        features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
        outputs = layers.pool_normalise_activate(features, norm_of(4), True)
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
        ours = layers.whiten_activate(images.contiguous(memory_format=layout), whitening)
        error = 1e-4 if DEVICE == "cpu" else 1e-2  # TF32
        torch.testing.assert_close(ours[:, :24], expected, rtol=error, atol=error)
        assert not ours[:, 24:].any()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert layers.whiten_activate(images, whitening).dtype == torch.bfloat16


@pytest.mark.parametrize("capability", [75, 90])
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
    """Return a config for each value of each choice, and for some value of each number."""
    types, configs = get_type_hints(AugmentConfig), []
    for field in dataclasses.fields(AugmentConfig):
        values = get_args(types[field.name]) or SOME[types[field.name]]
        base = AugmentConfig(translate=2) if field.name == "padding" else AugmentConfig()
        configs += [dataclasses.replace(base, **{field.name: value}) for value in values]
    return configs


def training_batches(config: AugmentConfig) -> list[torch.Tensor]:
    """Return a batch as training sees it in three epochs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 9, 9, 3), dtype=torch.uint8, generator=generator)
    positions = torch.randint(0, 2**33, (20,), generator=generator)
    batch = Batch(images.to(DEVICE), torch.zeros(20), positions.to(DEVICE))
    pixels = Pixels((0.49, 0.48, 0.45), (0.25, 0.24, 0.26), config, seed=2**40 + 3)
    return [pixels.for_training(batch, epoch) for epoch in range(3)]


def compare_augmentation(config: AugmentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "PIXELS", 64)  # so that an image takes two programs
    monkeypatch.setattr(kernels, "usable", lambda _: False)
    plain = training_batches(config)
    monkeypatch.setattr(kernels, "usable", lambda _: True)
    for ours, expected in zip(training_batches(config), plain, strict=True):
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()


@pytest.mark.parametrize("config", [*one_at_a_time(), *COMBINED])
def test_augmentation_is_the_same_to_the_bit(
    config: AugmentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare_augmentation(config, monkeypatch)


def test_an_augmentation_without_a_kernel_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class WithInversion(AugmentConfig):
        invert: bool = False

    plain = augment.augment

    def augment_and_invert(batch: Batch, config: WithInversion, *draws: int) -> Any:
        images, mask = plain(batch, config, *draws)
        return 255 - images if config.invert else images, mask

    monkeypatch.setattr(augment, "augment", augment_and_invert)
    compare_augmentation(WithInversion(flip="random", invert=True), monkeypatch)
