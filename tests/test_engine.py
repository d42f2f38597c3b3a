"""Training steps and evaluations, compared with plain PyTorch."""

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cifar_dist.config import AugmentConfig, TrainConfig
from cifar_dist.data import batches
from cifar_dist.data.augment import Pixels
from cifar_dist.data.batches import GlobalBatches, build_evaluation_loader, build_loader
from cifar_dist.data.images import Images
from cifar_dist.data.synthetic import draw
from cifar_dist.processes.start import start_processes
from cifar_dist.training.engine import (
    VIEWS,
    TrainState,
    evaluate,
    seed_step,
    settle_buckets,
    train_epoch,
    view,
)
from cifar_dist.training.guard import Guard
from cifar_dist.training.losses import Loss
from cifar_dist.training.metrics import Tally

PLAIN = Pixels((0.5, 0.5, 0.5), (0.25, 0.25, 0.25), AugmentConfig(), seed=0)


@pytest.fixture
def accelerator() -> Accelerator:
    return start_processes(TrainConfig())[0]


@pytest.fixture(scope="module")
def images() -> Images:
    return draw(96, 8, seed=(1,))


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))


def train(accelerator: Accelerator, images: Images, **options: object) -> TrainState:
    """Train one epoch with SGD at 0.1 and return the state."""
    config = TrainConfig(batch_size=32, **options)  # type: ignore[arg-type]
    network = small_network()
    average = None
    if config.ema:
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, fused=True)
    guard = Guard(optimizer, accelerator.device)
    model, optimizer = accelerator.prepare(network, optimizer)
    tally = Tally(accelerator.device)
    state = TrainState(network, model, optimizer, average, guard, tally, 0, torch.zeros(()))
    loader, _ = build_loader(accelerator, images, 32 // config.accumulate, seed=0)
    loss = Loss(config.label_smoothing)
    steps = sum(
        1 for _ in train_epoch(accelerator, state, loader, PLAIN, config, loss, lambda _: 0.1, 0)
    )
    assert steps == state.step == 3
    return state


def plain_loop(images: Images, smoothing: float = 0.0, clip: float = 0.0) -> list[nn.Module]:
    """Train the same epoch in plain PyTorch, and return the network after each step."""
    network = small_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    networks = []
    for rows in order.split(32):
        pixels = torch.from_numpy(images.images[rows.numpy()]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(images.labels[rows.numpy()])
        optimizer.zero_grad()
        loss = functional.cross_entropy(
            network((pixels - 0.5) / 0.25), labels, label_smoothing=smoothing
        )
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        copy = small_network()
        copy.load_state_dict(network.state_dict())
        networks.append(copy)
    return networks


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_an_epoch_equals_the_plain_loop_with_any_gradient_accumulation(
    accelerator: Accelerator, images: Images, accumulate: int
) -> None:
    state = train(accelerator, images, accumulate=accumulate)
    assert_same(state.network, plain_loop(images)[-1])


def test_label_smoothing_and_clipping(accelerator: Accelerator, images: Images) -> None:
    state = train(accelerator, images, label_smoothing=0.2, clip_norm=0.1)
    assert_same(state.network, plain_loop(images, smoothing=0.2, clip=0.1)[-1])
    with pytest.raises(AssertionError):
        assert_same(state.network, plain_loop(images)[-1])


def test_averaged_weights_are_updated_after_every_step(
    accelerator: Accelerator, images: Images
) -> None:
    state = train(accelerator, images, ema=0.6)
    first, second, third = plain_loop(images)
    expected = small_network()
    with torch.no_grad():
        for value, a, b, c in zip(
            *(network.parameters() for network in (expected, first, second, third)), strict=True
        ):
            value.copy_(0.6 * (0.6 * a + 0.4 * b) + 0.4 * c)
    assert_same(state.evaluated, expected)
    assert_same(state.network, third)


def test_training_metrics_are_those_of_the_trained_batches(
    accelerator: Accelerator, images: Images
) -> None:
    totals = train(accelerator, images).tally.totals(accelerator)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    correct, loss_sum = 0, 0.0
    # Each batch is counted with the weights before its step.
    for network, rows in zip([small_network(), *plain_loop(images)], order.split(32), strict=False):
        pixels = torch.from_numpy(images.images[rows.numpy()]).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(images.labels[rows.numpy()])
        logits = network((pixels - 0.5) / 0.25)
        correct += int((logits.argmax(1) == labels).sum())
        loss_sum += functional.cross_entropy(logits, labels, reduction="sum").item()
    assert (totals.correct, totals.count) == (correct, 96)
    assert totals.loss_sum == pytest.approx(loss_sum, rel=1e-5)


def test_dropout_depends_only_on_seed_step_micro_batch_and_rank() -> None:
    def draws(seed: int, step: int, part: int, rank: int) -> list[float]:
        process = SimpleNamespace(device=torch.device("cpu"), process_index=rank)
        seed_step(process, TrainConfig(seed=seed), step, part)  # type: ignore[arg-type]
        return torch.rand(4).tolist()

    places = [(1, 2, 0, 0), (2, 2, 0, 0), (1, 3, 0, 0), (1, 2, 1, 0), (1, 2, 0, 1)]
    found = [draws(*place) for place in places]
    assert len({tuple(values) for values in found}) == len(places)
    assert found == [draws(*place) for place in places]


def test_evaluation_equals_a_count_by_hand(accelerator: Accelerator, images: Images) -> None:
    network = small_network()
    loader = build_evaluation_loader(accelerator, images)
    result = evaluate(accelerator, network, loader, PLAIN, classes=10)
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(images.images)).permute(0, 3, 1, 2) / 255
        logits = network((pixels - 0.5) / 0.25)
    labels = torch.from_numpy(images.labels)
    predicted = logits.argmax(1)
    confusion = np.zeros((10, 10), dtype=int)
    for truth, guess in zip(labels.tolist(), predicted.tolist(), strict=True):
        confusion[truth, guess] += 1
    assert result.confusion.tolist() == confusion.tolist()
    assert result.totals.correct == int((predicted == labels).sum())
    assert result.totals.loss == pytest.approx(functional.cross_entropy(logits, labels).item())
    wrong = [(i, int(p)) for i, p in enumerate(predicted) if p != labels[i]]
    assert result.wrong == wrong

    confidence = logits.softmax(1).amax(1)
    error = 0.0
    for low in np.arange(15) / 15:
        chosen = (confidence >= low) & (confidence < low + 1 / 15)
        if chosen.any():
            gap = (predicted == labels)[chosen].double().mean() - confidence[chosen].double().mean()
            error += float(chosen.double().mean() * gap.abs())
    assert result.calibration_error == pytest.approx(error)


def test_each_micro_batch_has_its_own_dropout_mask(
    accelerator: Accelerator, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []

    def network() -> nn.Module:
        layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 10))
        layers[1].register_forward_hook(lambda *seen: masks.append(seen[2][0] == 0))
        return layers

    monkeypatch.setattr("tests.test_engine.small_network", network)
    train(accelerator, images, accumulate=2)
    assert len(masks) == 6
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


def test_settling_the_buckets_of_ddp_changes_no_weights(accelerator: Accelerator) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer, tally = torch.optim.SGD(network.parameters()), Tally(accelerator.device)
    state = TrainState(network, network, optimizer, None, None, tally, 0, torch.zeros(()))
    settle_buckets(state, 8)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_confidence_of_one_counts_in_the_last_bin(
    accelerator: Accelerator, images: Images
) -> None:
    network = small_network()
    with torch.no_grad():
        list(network.parameters())[-2].mul_(1e6)
    result = evaluate(accelerator, network, build_evaluation_loader(accelerator, images), PLAIN, 10)
    assert result is not None
    assert result.bins[0].tolist() == [0.0] * 14 + [96.0]
    assert result.bins[2].tolist() == [0.0] * 14 + [96.0]  # each with a confidence of exactly 1
    assert result.calibration_error == pytest.approx(1 - result.totals.accuracy)


@pytest.mark.parametrize("missing", [0, 5, 11])
def test_an_evaluation_that_misses_images_is_an_error(
    missing: int, accelerator: Accelerator, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "EVALUATION_BATCH", 8)
    original = GlobalBatches.__iter__

    def incomplete(self: GlobalBatches) -> Iterator[torch.Tensor]:
        yield from (batch for number, batch in enumerate(original(self)) if number != missing)

    monkeypatch.setattr(GlobalBatches, "__iter__", incomplete)
    loader = build_evaluation_loader(accelerator, images)
    with pytest.raises(RuntimeError, match="evaluation counted 88 images of 96"):
        evaluate(accelerator, small_network(), loader, PLAIN, classes=10)


def test_an_evaluation_keeps_no_tensors_of_a_batch(
    accelerator: Accelerator, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small results between the large buffers of batches fragment memory: the next buffers do not
    # fit into the gaps. With ten times the test images, evaluation took 150 MB more.
    monkeypatch.setattr(batches, "EVALUATION_BATCH", 8)
    held, network = [], small_network()
    network.register_forward_hook(
        lambda *_: held.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))
    )
    evaluate(accelerator, network, build_evaluation_loader(accelerator, images), PLAIN, classes=10)
    assert len(held) == 12
    assert len(set(held[1:-1])) == 1  # the first follows no batch, the last prefetches none


def test_a_class_without_images_has_no_accuracy(accelerator: Accelerator, images: Images) -> None:
    some = images.take(np.flatnonzero(images.labels != 4))
    loader = build_evaluation_loader(accelerator, some)
    per_class = evaluate(accelerator, small_network(), loader, PLAIN, classes=10).per_class
    assert np.isnan(per_class).tolist() == [label == 4 for label in range(10)]


def test_views_shift_and_mirror() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert view(image, False, 0, 0) is image
    assert view(image, True, 0, 0)[0, 0, 0].tolist() == [3, 2, 1, 0]
    moved = view(image, False, 1, -1)[0, 0]
    assert moved[1:, :-1].tolist() == image[0, 0, :-1, 1:].tolist()
    assert moved[0].tolist() == [1, 2, 3, 3]  # the border is repeated
    assert {len(VIEWS[name]) for name in VIEWS} == {1, 2, 6}
    for views in VIEWS.values():
        assert sum(share for share, *_ in views) == pytest.approx(1)
    for views in (VIEWS["flip"], VIEWS["flip_shift"]):  # mirrored and not, with equal weights
        assert {(w, not flip, y, x) for w, flip, y, x in views} == set(views)


def test_flip_test_time_augmentation_is_invariant_to_mirroring(
    accelerator: Accelerator, images: Images
) -> None:
    network = small_network()
    mirrored = Images(images.images[:, :, ::-1].copy(), images.labels, images.classes)
    one, other = (
        evaluate(
            accelerator, network, build_evaluation_loader(accelerator, part), PLAIN, 10, "flip"
        )
        for part in (images, mirrored)
    )
    assert one.loss_sum == pytest.approx(other.loss_sum, rel=1e-5)
