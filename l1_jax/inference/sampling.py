"""From logits to the next token.

Legend: B batch, V vocabulary (padded).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from l1_jax.inference.section import GenerationConfig

# The float32 numbers from SMALLEST to HIGHEST are computed with everywhere: XLA takes smaller ones
# for 0.
LOWEST, HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).tiny)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens in the text less likely. Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858,
    section 4.1."""
    penalty = min(max(penalty, SMALLEST), HIGHEST)
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, jnp.clip(lowered, LOWEST, HIGHEST), logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Drops all but the k likeliest tokens, and what is as likely as the last of them."""
    smallest = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < smallest, LOWEST, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens whose probabilities sum to p, and what is as likely as the last of
    them. Source: Holtzman et al. 2019, arXiv:1904.09751, eq. 2."""
    descending = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    # 0 at the first, which is always kept
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest = jnp.min(
        jnp.where(before < max(p, SMALLEST), descending, jnp.inf), axis=-1, keepdims=True
    )
    return jnp.where(logits_BV < smallest, LOWEST, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Drops tokens less likely than p times the likeliest. Source: Nguyen et al. 2024,
    arXiv:2407.01082, section 3."""
    least = logits_BV.max(axis=-1, keepdims=True) + math.log(p)
    return jnp.where(logits_BV < least, LOWEST, logits_BV)


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None, how: GenerationConfig
) -> jax.Array:
    """The next token of each row, int32 `[B]`, from float32 logits; the filters act in the order of
    this function. Each row has its own key, so neighbours do not matter. `seen_BV` (bool) marks the
    tokens already in the text, which a repetition penalty needs. A token whose logit is the lowest
    float32, as padding's is, or less, is never drawn."""
    possible_BV = logits_BV > LOWEST
    logits_BV = jnp.minimum(logits_BV, HIGHEST)
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, how.repetition_penalty)
    logits_BV = jnp.where(possible_BV, logits_BV, -jnp.inf)
    if how.temperature < SMALLEST:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    # Of differences to the largest, which stays 0: whatever the temperature, nothing is infinite
    # that is possible.
    largest_B1 = jnp.maximum(logits_BV.max(axis=-1, keepdims=True), LOWEST)
    scaled_BV = jnp.maximum(logits_BV - largest_B1, LOWEST) / min(how.temperature, HIGHEST)
    logits_BV = jnp.where(possible_BV, scaled_BV, -jnp.inf)

    if how.top_k is not None:
        logits_BV = keep_top_k(logits_BV, how.top_k)
    if how.top_p is not None and how.top_p < 1.0:  # else rounding would drop the least likely
        logits_BV = keep_top_p(logits_BV, how.top_p)
    if how.min_p:
        logits_BV = keep_min_p(logits_BV, how.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
