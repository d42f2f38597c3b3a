"""Fused layers against torch's own, in Triton's interpreter where there is no GPU."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

INTERPRETED = {} if DEVICE == "cuda" else {"TRITON_INTERPRET": "1"}

with mock.patch.dict(os.environ, INTERPRETED):  # read when Triton is imported
    pytest.importorskip("triton")
    from cifar_dist.models import fused


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    """Triton imports some of itself at its first use."""
    with mock.patch.dict(os.environ, INTERPRETED):
        yield


def norm_of(channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    layer = nn.BatchNorm2d(channels, eps=1e-5, momentum=0.4).to(DEVICE)
    with torch.no_grad():
        for values in (layer.weight, layer.bias, layer.running_mean):
            values.normal_()
        layer.running_var.uniform_(0.5, 2)
    return layer


def layers(features: torch.Tensor, layer: nn.BatchNorm2d, pool: bool) -> torch.Tensor:
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
    monkeypatch.setattr(fused, "PROGRAMS", 5)  # so that programs add up several tiles
    torch.manual_seed(0)
    features = (2 * torch.randn(shape, device=DEVICE) + 3).contiguous(
        memory_format=torch.channels_last
    )
    found = {}
    for name in ("layers", "fused"):
        layer, inputs = norm_of(shape[1]), features.clone().requires_grad_()
        function = layers if name == "layers" else fused.pool_normalise_activate
        outputs = function(inputs, layer, pool)
        torch.manual_seed(2)
        outputs.backward(torch.randn(outputs.shape, device=DEVICE))
        found[name] = [outputs, inputs.grad, layer.weight.grad, layer.bias.grad]
        found[name] += [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    for expected, ours in zip(found["layers"], found["fused"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "pool"), CASES)
def test_evaluation_equals_the_layers(shape: tuple[int, ...], pool: bool) -> None:
    layer, features = norm_of(shape[1]).eval(), torch.randn(shape, device=DEVICE)
    ours = fused.pool_normalise_activate(features, layer, pool)
    torch.testing.assert_close(ours, layers(features, layer, pool), rtol=1e-5, atol=1e-5)


def test_a_mean_far_from_zero_cancels_nothing() -> None:
    features = torch.randn(16, 8, 6, 6, device=DEVICE) + 1000
    layer, reference = norm_of(8), norm_of(8).double()
    ours = fused.pool_normalise_activate(features, layer, False)
    expected = layers(features.double(), reference, False)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_a_number_stays_so() -> None:
    for place in range(4):
        features = torch.randn(2, 4, 4, 4, device=DEVICE)
        features[1, 2, 2 + place // 2, place % 2] = torch.nan
        features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
        outputs = fused.pool_normalise_activate(features, norm_of(4), True)
        outputs.sum().backward()
        for values in (outputs, features.grad):
            assert values is not None
            bad = values.isnan().flatten(2).any(dim=2).any(dim=0)
            assert bad.tolist() == [False, False, True, False]


@pytest.mark.parametrize("stride", [1, 2])
def test_whitening_equals_a_convolution(stride: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 9, 8, device=DEVICE)
    filters = torch.randn(24, 3, 2, 2, device=DEVICE)
    expected = functional.gelu(functional.conv2d(images, filters, stride=stride))
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = fused.whiten_activate(images.contiguous(memory_format=layout), filters, stride)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert fused.whiten_activate(images, filters, stride).dtype == torch.bfloat16
