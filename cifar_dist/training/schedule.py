"""Learning-rate schedules as pure functions of the step, without a scheduler to save."""

import math
from collections.abc import Callable

from cifar_dist.config import ScheduleConfig

# A shape maps the progress since the warm-up (from 0 to 1 at the end of the run) and the number of
# epochs since the start of the run to a learning-rate multiplier between `final` and 1.
Shape = Callable[[ScheduleConfig, float, float], float]


def _cosine(config: ScheduleConfig, progress: float, epochs: float) -> float:
    return config.final + (1 - config.final) * (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Shape] = {
    "constant": lambda config, progress, epochs: 1.0,
    "step": lambda config, progress, epochs: config.gamma ** int(epochs // config.step_epochs),
    "cosine": _cosine,  # Loshchilov and Hutter, 2017, without restarts
    "linear": lambda config, progress, epochs: 1 - (1 - config.final) * progress,
    "one_cycle": _cosine,  # Smith and Topin, 2018: a long rise, then the fall
}
ONE_CYCLE_RISE = 0.3  # fraction of the run, if schedule.warmup_epochs is 0
ONE_CYCLE_START = 1 / 25


def total_steps(epochs: float, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a run, rounded if `epochs` is fractional."""
    return round(epochs * steps_per_epoch)


def learning_rate(
    config: ScheduleConfig, peak: float, step: int, steps_per_epoch: int, epochs: float
) -> float:
    """Return the learning rate of a step.

    Args:
        config: the schedule and its options.
        peak: maximum of the learning rate.
        step: optimizer step, from 0.
        steps_per_epoch: optimizer steps in an epoch.
        epochs: length of the run.
    """
    total = total_steps(epochs, steps_per_epoch)
    warmup, start = config.warmup_epochs * steps_per_epoch, 0.0
    if config.name == "one_cycle":
        warmup, start = warmup or ONE_CYCLE_RISE * total, ONE_CYCLE_START
    if step + 1 < warmup:
        return peak * (start + (1 - start) * (step + 1) / warmup)
    progress = min(1.0, max(0.0, (step - warmup) / max(1.0, total - warmup)))
    return peak * SCHEDULES[config.name](config, progress, step / steps_per_epoch)
