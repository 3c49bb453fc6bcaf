"""Which steps can be trusted: the judge of a step's loss, and float16's loss scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.training.section import TrainingConfig

INITIAL_LOSS_SCALE = 2.0**16
LOSS_SCALE_GROWTH_STEPS = 2000

# The estimate of the loss: how many steps it remembers, how many it wants before it calls a loss a
# spike, and at how many deviations a loss is clipped before it is taken in, so that one outlier
# does not move it much.
ESTIMATE_STEPS = 100
ESTIMATE_WARMUP = 50
ESTIMATE_CLIP = 3.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    scale: jax.Array  # float32 scalar
    good_steps: jax.Array  # int32 scalar: finite steps since the last change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """What the steps so far say of the next loss, and how many were refused; see `judge`."""

    mean: jax.Array  # float32 scalar: of the loss, in nats
    deviation: jax.Array  # float32 scalar: mean absolute deviation from it
    seen: jax.Array  # int32 scalar: losses that the two are made of
    refused: jax.Array  # int32 scalar: steps in a row whose update was refused


def initial_loss_scale() -> LossScale:
    """The loss scale of step 0."""
    return LossScale(jnp.float32(INITIAL_LOSS_SCALE), jnp.int32(0))


def initial_health() -> Health:
    """What is known of the next loss where none was seen."""
    return Health(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))


def tree_where(condition: jax.Array, yes: Any, no: Any) -> Any:
    """`jnp.where` of a scalar condition for each array of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def judge(
    health: Health,
    loss: jax.Array,
    finite: jax.Array,
    overflow: jax.Array,
    training: TrainingConfig,
) -> tuple[Health, jax.Array]:
    """What a step's loss makes of the estimate of the loss, and whether the step is refused.

    The estimate is an exponentially weighted mean and mean absolute deviation. A spike is a loss
    that is more than `training.spike_threshold` deviations above the mean; it is refused unless
    `on_spike` is warn. What is not finite is refused, but for an `overflow` of float16.

    Args:
        health: before the step.
        loss: float32 scalar, in nats.
        finite: bool scalar: loss and gradient are.
        overflow: bool scalar: they are not, and a smaller loss scale may mend it.
        training: the section of the run's config.

    Returns:
        The health after the step, and whether its loss is a spike. `refused` counts refused steps
        in a row; one that is to stop the run at once counts for all that may be.
    """
    limit = training.max_skipped_steps
    mean = jnp.where(health.seen > 0, health.mean, loss)
    excess = loss - mean

    # Once the run is to stop, neither the estimate nor the count changes any more.
    ended = health.refused >= limit
    known = health.seen >= ESTIMATE_WARMUP
    spike = finite & known & (excess > training.spike_threshold * health.deviation)

    # The estimate after this loss. Its first losses weigh the same, as in a plain mean.
    bound = jnp.where(known, ESTIMATE_CLIP * health.deviation, jnp.inf)
    clipped = jnp.clip(excess, -bound, bound)
    rate = jnp.maximum(1 / (health.seen + 1), 1 / ESTIMATE_STEPS)
    deviation = health.deviation + rate * (jnp.abs(clipped) - health.deviation)
    taken = Health(
        mean=mean + rate * clipped,
        deviation=deviation,
        seen=health.seen + 1,
        refused=health.refused,
    )

    # An overflow neither counts as refused nor ends the row of those that were.
    cost = jnp.where(finite, 1, limit if training.on_nonfinite == "stop" else 1)
    refuse = (~finite & ~overflow) | (spike & (training.on_spike != "warn"))
    one_more = health.refused + cost
    none_now = jnp.where(finite, 0, health.refused)
    refused = jnp.where(refuse, one_more, none_now)
    refused = jnp.where(ended, health.refused, refused)

    estimate = tree_where(finite & ~ended, taken, health)
    return dataclasses.replace(estimate, refused=refused), spike


def rescale(state: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after an overflow, doubles it after many finite steps."""
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grow = good_steps >= LOSS_SCALE_GROWTH_STEPS

    grown = jnp.where(grow, state.scale * 2, state.scale)
    halved = jnp.maximum(state.scale / 2, 1.0)
    scale = jnp.where(finite, grown, halved)
    return LossScale(scale, good_steps=jnp.where(grow, 0, good_steps))
