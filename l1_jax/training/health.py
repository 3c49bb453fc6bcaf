"""Which steps can be trusted: the judge of a step's loss, and float16's loss scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.training.section import TrainingConfig

INITIAL_LOSS_SCALE = 2.0**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2."""

    scale: jax.Array  # float32 scalar
    good_steps: jax.Array  # int32 scalar: finite steps since the last change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """What the steps so far say of the next loss, and how many of them were refused; see `training.step.judge`."""

    mean: jax.Array  # float32 scalar: of the loss, in nats
    deviation: jax.Array  # float32 scalar: mean absolute deviation from it
    seen: jax.Array  # int32 scalar: losses that the two are made of
    refused: jax.Array  # int32 scalar: steps in a row whose update was refused


LOSS_SCALE_GROWTH_STEPS = 2000
# The estimate of the loss: how many steps it remembers, how many it wants before it calls a loss a spike, and at how
# many deviations a loss is clipped before it is taken in, so that one outlier does not move it much.
ESTIMATE_STEPS, ESTIMATE_WARMUP, ESTIMATE_CLIP = 100, 50, 3.0


def tree_where(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def judge(
    health: Health, loss: jax.Array, finite: jax.Array, overflow: jax.Array, training: TrainingConfig
) -> tuple[Health, jax.Array]:
    """What a step's loss makes of the estimate of the loss, whether it is refused, and whether it is a spike.

    The estimate is an exponentially weighted mean and mean absolute deviation. A spike is a loss that is more than
    `training.spike_threshold` deviations above the mean; it is refused unless `on_spike` is warn. What is not finite is
    refused, but for an `overflow` of float16. `refused` counts refused steps in a row; one that is to stop the run at
    once counts for all that may be.
    """
    limit, mean = training.max_skipped_steps, jnp.where(health.seen > 0, health.mean, loss)
    excess = loss - mean
    ended, known = health.refused >= limit, health.seen >= ESTIMATE_WARMUP
    spike = finite & known & (excess > training.spike_threshold * health.deviation)
    bound = jnp.where(known, ESTIMATE_CLIP * health.deviation, jnp.inf)
    clipped, rate = jnp.clip(excess, -bound, bound), jnp.maximum(1 / (health.seen + 1), 1 / ESTIMATE_STEPS)
    deviation = health.deviation + rate * (jnp.abs(clipped) - health.deviation)
    taken = Health(mean + rate * clipped, deviation, health.seen + 1, health.refused)

    cost = jnp.where(finite, 1, limit if training.on_nonfinite == "stop" else 1)
    refuse = (~finite & ~overflow) | (spike & (training.on_spike != "warn"))
    refused = jnp.where(refuse, health.refused + cost, jnp.where(finite, 0, health.refused))
    refused = jnp.where(ended, health.refused, refused)
    return dataclasses.replace(tree_where(finite & ~ended, taken, health), refused=refused), spike


def rescale(state: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after an overflow, doubles it after many finite steps."""
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= LOSS_SCALE_GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), jnp.maximum(state.scale / 2, 1.0))
    return LossScale(scale, jnp.where(grow, 0, good))
