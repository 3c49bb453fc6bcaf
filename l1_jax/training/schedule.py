"""The learning rate of each step."""

import optax

from l1_jax.errors import UserError
from l1_jax.training.section import TrainingConfig


def resolve_warmup(warmup_steps: int | str, schedule_steps: int) -> int:
    """Warm-up in steps; `auto` is min(500, 10 % of the schedule). UserError where it leaves nothing of the schedule."""
    if isinstance(warmup_steps, str):
        return min(500, schedule_steps // 10)
    if warmup_steps >= schedule_steps:
        what = f"training.warmup_steps {warmup_steps} is not below the {schedule_steps} steps of the schedule"
        raise UserError(what, "Set training.warmup_steps: auto, or train for longer")
    return warmup_steps


def check_decay(config: TrainingConfig) -> None:
    """Raises UserError where the warm-up reaches into the decay of wsd. `config` has its steps resolved."""
    assert isinstance(config.warmup_steps, int)
    assert config.schedule_steps
    if config.schedule == "wsd" and config.warmup_steps > config.schedule_steps - decay_steps(config):
        what = f"training.warmup_steps {config.warmup_steps} and the {decay_steps(config)} steps in which wsd decays"
        remedy = "Lower training.warmup_steps or training.decay_fraction, or train for longer"
        raise UserError(f"{what} are more than the {config.schedule_steps} of the schedule", remedy)


def decay_steps(config: TrainingConfig) -> int:
    """In which wsd decays; `config` is resolved."""
    assert config.schedule_steps
    return max(1, round(config.decay_fraction * config.schedule_steps))


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Step's number, 1 for the first, -> its learning rate: linear warm-up, then a cosine to the floor at
    `schedule_steps`, or the peak and a linear decay to that floor, where it stays. `config` is resolved.

    Source of wsd: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, eq. 1; linear: Hägele et al. 2024, arXiv:2405.18392.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    assert config.schedule_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.schedule_steps, floor)
    start = config.schedule_steps - decay_steps(config)
    parts = [
        optax.linear_schedule(0.0, peak, config.warmup_steps),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, floor, decay_steps(config)),
    ]
    return optax.join_schedules(parts, [config.warmup_steps, start])
