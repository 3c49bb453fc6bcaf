"""The learning-rate schedule and the optimizer."""

from typing import Any

import jax
import optax

from l1_jax.config import TrainingConfig
from l1_jax.errors import UserError


def resolve_warmup(warmup_steps: int | str, schedule_steps: int) -> int:
    """Warm-up in steps; `auto` is min(500, 10 % of the schedule). UserError where it leaves nothing of the schedule."""
    if isinstance(warmup_steps, str):
        return min(500, schedule_steps // 10)
    if warmup_steps >= schedule_steps:
        what = f"training.warmup_steps {warmup_steps} is not below the {schedule_steps} steps of the schedule"
        raise UserError(what, "Set training.warmup_steps: auto, or train for longer")
    return warmup_steps


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Step's number, 1 for the first, -> its learning rate: linear warm-up, then a cosine to the floor at
    `schedule_steps`, where it stays. `config` is resolved."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.schedule_steps, config.min_learning_rate
    )


def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
    """Whether weight decay applies: to matrices and token embeddings, not to biases, norms and positions."""
    return path[-1].key in ("kernel", "token_embedding")


def create_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """Clipping, then AdamW without its learning rate: the step multiplies by -rate(step), also after skipped updates.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, lambda params: jax.tree_util.tree_map_with_path(decays, params)),
    )
