"""Optimizers: steps equal to torch's, Muon's definition, and skipped steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cifar_dist.config import ModelConfig, OptimConfig
from cifar_dist.models.catalogue import build_network
from cifar_dist.training.optim import Muon, build_optimizer, orthogonalise
from tests.helpers import TINY

CONFIG = OptimConfig(name="muon", lr=0.2, bias_lr=0.4, head_lr=2.0, momentum=0.6, weight_decay=0.01)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return build_network(ModelConfig(name="speednet", options={"widths": [8, 16], "depth": 2}), 4)


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("name", "nesterov"), [("sgd", False), ("sgd", True), ("adamw", False)])
def test_steps_equal_those_of_torch(name: str, nesterov: bool) -> None:
    config = OptimConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    ours, theirs = small_network(), small_network()
    optimizer = build_optimizer(ours, config)
    reference: torch.optim.Optimizer = (
        torch.optim.SGD(theirs.parameters(), 0.1, 0.9, 0, 0.01, nesterov=nesterov, fused=True)
        if name == "sgd"
        else torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.01, fused=True)
    )
    for seed in range(3):
        for network, either in ((ours, optimizer), (theirs, reference)):
            either.zero_grad()
            give_gradients(network, seed)
            either.step()
        optimizer.load_state_dict(optimizer.state_dict())
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    "name", ["sgd", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "muon"))]
)
def test_a_run_imports_no_compiler(name: str, tmp_path: Path) -> None:
    arguments = [*TINY, "--optim.name", name, "--optim.lr", "0.001", "--train.epochs", "1"]
    arguments += ["--model.name", "speednet", "--model.widths", "[8, 16]"]
    arguments += ["--track.log_with", "[tensorboard]"]
    code = (
        "import sys; from cifar_dist.train import main; code = main(sys.argv[1:]); "
        "heavy = {'torch._dynamo', 'torch.distributed.tensor', 'sympy'}; "
        "sys.exit(code or 10 * bool(heavy & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code, *arguments, "--out", str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("shape", [(3, 8, 32), (2, 32, 8), (1, 16, 16)])
def test_orthogonalise_moves_singular_values_to_one_and_keeps_the_vectors(
    shape: tuple[int, ...],
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ torch.stack(orthogonalise(matrices, steps=5)) @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.3
    assert diagonal.max() < 1.4
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(3, 8, 32), (2, 32, 8)])
def test_iterating_on_the_gram_matrix_equals_the_definition(
    shape: tuple[int, ...],
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    expected = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(3):
        square = expected @ expected.mT
        factor = -4.7750 * square + 2.0315 * square @ square
        expected = 3.4445 * expected + factor @ expected
    assert torch.allclose(torch.stack(orthogonalise(matrices)).double(), expected, atol=1e-5)


def test_muon_steps_equal_the_definition() -> None:
    """Compare with the published rule, one convolution at a time."""
    network = small_network()
    optimizer = build_optimizer(network, CONFIG)
    expected = {name: p.detach().clone() for name, p in network.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step in range(3):
        give_gradients(network, step)
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                continue
            weights, momentum, gradient = expected[name], momenta[name], parameter.grad
            assert gradient is not None
            if parameter.ndim == 4:
                momentum.mul_(0.6).add_(gradient)
                ahead = (gradient + 0.6 * momentum).flatten(1)
                weights.mul_(len(weights) ** 0.5 / weights.norm())
                weights.sub_(0.2 * orthogonalise([ahead])[0].view_as(weights))
            else:
                decayed = gradient + 0.01 * weights
                momentum.mul_(0.85).add_(decayed)
                rate = 2.0 if parameter.ndim == 2 else 0.4
                weights.sub_(rate * (decayed + 0.85 * momentum))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr * group.get("share", 1.0)
        optimizer.step()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], msg=name)


def test_muon_trains_a_network_without_convolutions() -> None:
    network = nn.Linear(3, 2)
    optimizer = build_optimizer(network, CONFIG)
    give_gradients(network, 0)
    before = network.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(network.weight, before)


def test_a_non_finite_step_changes_nothing() -> None:
    network = small_network()
    optimizer = build_optimizer(network, CONFIG)
    optimizer.found_inf = torch.zeros(())  # type: ignore[attr-defined]
    give_gradients(network, 0)
    optimizer.step()
    weights = [p.detach().clone() for p in network.parameters()]
    states = [v.clone() for s in optimizer.state.values() for v in s.values()]
    optimizer.found_inf.fill_(1)  # type: ignore[attr-defined]
    give_gradients(network, 1)
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.flatten()[0] = torch.nan
    optimizer.step()
    assert all(map(torch.equal, weights, network.parameters()))
    assert all(map(torch.equal, states, [v for s in optimizer.state.values() for v in s.values()]))


def test_frozen_weights_are_in_no_param_group() -> None:
    network = small_network()
    optimizer = build_optimizer(network, CONFIG)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters() if p.requires_grad}
    assert isinstance(optimizer, Muon)
