"""Learning rate schedules: values at selected steps."""

import pytest

from cifar_dist.config import ScheduleConfig
from cifar_dist.training.schedule import learning_rate, total_steps


def curve(**options: object) -> list[float]:
    config = ScheduleConfig(**options)  # type: ignore[arg-type]
    return [learning_rate(config, 2.0, step, steps_per_epoch=10, epochs=10) for step in range(100)]


def test_constant_with_and_without_warm_up() -> None:
    assert curve(name="constant") == [2.0] * 100
    rates = curve(name="constant", warmup_epochs=2)
    assert rates[:20] == pytest.approx([0.1 * (step + 1) for step in range(20)])
    assert rates[20:] == [2.0] * 80


def test_step_drops_by_gamma() -> None:
    rates = curve(name="step", step_epochs=5, gamma=0.4)
    assert set(rates[:50]) == {2.0}
    assert rates[50:] == pytest.approx([0.8] * 50)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_cosine_and_linear_decay(name: str) -> None:
    rates = curve(name=name, final=0.1, warmup_epochs=1)
    assert rates[9] == pytest.approx(2.0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[55] == pytest.approx(1.1)  # half way between 2.0 and 0.2
    assert 0.2 < rates[-1] < 0.25


def test_one_cycle_rises_then_falls() -> None:
    rates = curve(name="one_cycle")
    assert rates[0] == pytest.approx(2 / 25 + 2 * 24 / 25 / 30)
    assert max(rates) == rates[29] == pytest.approx(2.0)
    assert rates[:30] == sorted(rates[:30])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[-1] < 0.01


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(2, 200), (0.29, 29), (0.57, 57), (1.1, 110), (9.95, 995), (0.294, 29), (0.296, 30)],
)
def test_a_fraction_of_an_epoch_is_rounded_to_steps(epochs: float, steps: int) -> None:
    assert total_steps(epochs, 100) == steps  # 0.29 * 100 is 28.999999999999996


def test_a_longer_run_stretches_the_schedule() -> None:
    config = ScheduleConfig(name="linear")
    assert learning_rate(config, 1.0, 50, 10, epochs=10) == pytest.approx(0.5)
    assert learning_rate(config, 1.0, 50, 10, epochs=20) == pytest.approx(0.75)
