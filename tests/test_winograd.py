"""Convolutions in fewer multiplications: torch's own results, where they apply and only there."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from cifar_dist.config import ModelConfig
from cifar_dist.models.catalogue import build_network
from cifar_dist.speedups.winograd import WinogradConv2d, use_winograd


def both(inputs: int, outputs: int, size: int = 3, **options) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return a convolution as torch computes it, and the same after `use_winograd`."""
    torch.manual_seed(0)
    plain = nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})
    fast = copy.deepcopy(plain)
    use_winograd(fast)
    return plain, fast


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (3, 4), (16, 13), (4, 9)])
def test_outputs_and_gradients_are_those_of_the_definition(height, width, layout):
    matches_the_definition(torch.randn(3, 128, height, width), layout, *both(128, 192))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (3, 7), (11, 13), (5, 32)])
def test_filters_of_5x5_too(height, width, bias, layout):
    # 100 images are computed in parts.
    images = torch.randn(100, 32, height, width)
    matches_the_definition(images, layout, *both(32, 48, 5, bias=bias))


def matches_the_definition(images, layout, plain, fast) -> None:
    assert type(fast) is WinogradConv2d
    images = images.contiguous(memory_format=layout)
    torch_way = plain(images).detach()
    given = [images.requires_grad_(), images.detach().double().requires_grad_()]
    outputs = [fast(given[0]), plain.double()(given[1])]
    assert not torch.equal(outputs[0], torch_way)  # it did go another way
    gradient = torch.randn(outputs[0].shape)
    outputs[0].backward(gradient)
    outputs[1].backward(gradient.double())
    pairs = [outputs, [image.grad for image in given], [fast.weight.grad, plain.weight.grad]]
    pairs += [] if fast.bias is None else [[fast.bias.grad, plain.bias.grad]]
    for ours, exact in pairs:
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 1e-5  # 1e-3 where a GPU multiplies in TF32


@pytest.mark.parametrize(("size", "channels"), [(3, 128), (5, 32)])
def test_images_that_need_no_gradient_get_none(size, channels):
    _, fast = both(channels, channels, size, bias=False)
    images = torch.randn(2, channels, 8, 8)
    fast(images).sum().backward()
    assert images.grad is None
    assert fast.weight.grad is not None


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(("size", "channels"), [(3, 128), (5, 32)])
def test_an_activation_may_overwrite_the_outputs(size, channels, side):
    _, fast = both(channels, channels, size, bias=False)
    images = torch.randn(2, channels, side, side)
    functional.relu(fast(images), inplace=True).sum().backward()
    gradient = fast.weight.grad.clone()
    fast.zero_grad()
    functional.relu(fast(images)).sum().backward()
    assert torch.equal(fast.weight.grad, gradient)


def test_training_may_come_after_inference():
    _, fast = both(32, 32, 5)
    images = torch.randn(2, 32, 24, 24)  # a width that no other test has: its matrices are kept
    with torch.inference_mode():
        inferred = fast(images)
    outputs = fast(images)
    outputs.sum().backward()
    assert torch.equal(outputs, inferred)
    assert fast.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 0},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
    ],
)
def test_other_convolutions_are_left_alone(options):
    assert type(both(128, 128, **options)[1]) is nn.Conv2d


@pytest.mark.parametrize(("size", "wide"), [(3, 128), (5, 32)])
def test_narrow_ones_are_left_alone(size, wide):
    assert type(both(wide - 1, 256, size)[1]) is nn.Conv2d
    assert type(both(256, wide - 1, size)[1]) is nn.Conv2d


def test_other_sizes_are_left_alone():
    assert type(both(128, 128, 7)[1]) is nn.Conv2d
    assert type(both(128, 128, 1)[1]) is nn.Conv2d


def test_small_images_and_low_precision_are_torchs_own():
    plain, fast = both(128, 128)
    small, images = torch.randn(4, 128, 2, 2), torch.randn(4, 128, 8, 8)
    assert torch.equal(fast(small), plain(small))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), plain(images))
    assert not torch.equal(fast(images), plain(images))  # here it rounds in its own way


@pytest.mark.parametrize("width", [4, 9, 33])
def test_filters_of_5x5_on_widths_that_do_not_pay_are_torchs_own(width):
    plain, fast = both(32, 32, 5)
    images = torch.randn(4, 32, 8, width)
    assert torch.equal(fast(images), plain(images))


def test_a_network_keeps_its_names_weights_and_results():
    torch.manual_seed(0)
    network = build_network(ModelConfig(name="resnet18"), 10).eval()
    fast = [module for module in network.modules() if type(module) is WinogradConv2d]
    assert len(fast) == 9
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = network(images)
        for module in fast:
            module.__class__ = nn.Conv2d
        plain = network(images)
    assert not torch.equal(ours, plain)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)
    assert functional.cosine_similarity(ours.flatten(), plain.flatten(), dim=0) > 0.999999


@pytest.mark.parametrize("name", ["tutorial", "deep", "residual", "vgg16", "resnet18", "speednet"])
def test_tensorboard_can_draw_the_network(name: str, tmp_path: Path) -> None:
    network = build_network(ModelConfig(name=name), 10).eval()
    with warnings.catch_warnings(), SummaryWriter(str(tmp_path)) as writer:
        warnings.simplefilter("ignore")  # it has no other tracer than torch.jit
        writer.add_graph(network, torch.zeros(1, 3, 32, 32))
