"""The learning rate of each step."""

import optax

from l1_jax.config.resolve import decay_steps
from l1_jax.training.section import TrainingConfig


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Step's number, 1 for the first, -> its learning rate; `config` is resolved.

    A linear warm-up; then a cosine to the floor at `schedule_steps`, or (wsd) the peak and a linear
    decay to that floor. There it stays.

    Source of wsd: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, eq. 1; linear: Hägele et al. 2024,
    arXiv:2405.18392.
    """
    assert config.schedule_steps
    peak = config.learning_rate
    floor = config.min_learning_rate

    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=config.warmup_steps,
            decay_steps=config.schedule_steps,
            end_value=floor,
        )

    # wsd: warm-up, stable, decay.
    decay = decay_steps(config.decay_fraction, config.schedule_steps)
    warm_up = optax.linear_schedule(0.0, peak, config.warmup_steps)
    stable = optax.constant_schedule(peak)
    cool_down = optax.linear_schedule(peak, floor, decay)
    boundaries = [config.warmup_steps, config.schedule_steps - decay]
    return optax.join_schedules([warm_up, stable, cool_down], boundaries)
