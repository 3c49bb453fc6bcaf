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
SMALLEST = float(np.finfo(np.float32).tiny)
HIGHEST = float(np.finfo(np.float32).max)
LOWEST = float(np.finfo(np.float32).min)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens in the text less likely.

    Args:
        logits_BV: float32.
        seen_BV: bool; true for tokens in the text.
        penalty: above 1 they become less likely.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1.
    """
    penalty = min(max(penalty, SMALLEST), HIGHEST)
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, jnp.clip(lowered, LOWEST, HIGHEST), logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Drops all but the k likeliest tokens, and what is as likely as the last of them."""
    vocab = logits_BV.shape[-1]
    top_BK, _ = jax.lax.top_k(logits_BV, min(k, vocab))
    smallest_B1 = top_BK[:, -1:]
    return jnp.where(logits_BV < smallest_B1, LOWEST, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens whose probabilities sum to p, and what is as likely as the last.

    Source: Holtzman et al. 2019, arXiv:1904.09751, eq. 2.
    """
    descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)

    # What likelier tokens sum to: 0 at the first, which is always kept.
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    kept_BV = jnp.where(before_BV < max(p, SMALLEST), descending_BV, jnp.inf)
    smallest_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV < smallest_B1, LOWEST, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Drops tokens less likely than p times the likeliest.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    largest_B1 = logits_BV.max(axis=-1, keepdims=True)
    least_B1 = largest_B1 + math.log(p)
    return jnp.where(logits_BV < least_B1, LOWEST, logits_BV)


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None, how: GenerationConfig
) -> jax.Array:
    """The next token of each row, int32 `[B]`; the filters act in the order of this function.

    A token whose logit is the lowest float32, as padding's is, or less, is never drawn.

    Args:
        logits_BV: float32.
        keys_B: each row's own, so neighbours do not matter.
        seen_BV: bool; marks the tokens already in the text, which a repetition penalty needs.
        how: the settings.
    """
    possible_BV = logits_BV > LOWEST
    logits_BV = jnp.minimum(logits_BV, HIGHEST)
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, how.repetition_penalty)
    logits_BV = jnp.where(possible_BV, logits_BV, -jnp.inf)

    is_greedy = how.temperature < SMALLEST
    if is_greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    # Of differences to the largest, which stays 0: whatever the temperature, nothing is infinite
    # that is possible.
    temperature = min(how.temperature, HIGHEST)
    largest_B1 = jnp.maximum(logits_BV.max(axis=-1, keepdims=True), LOWEST)
    scaled_BV = jnp.maximum(logits_BV - largest_B1, LOWEST) / temperature
    logits_BV = jnp.where(possible_BV, scaled_BV, -jnp.inf)

    if how.top_k is not None:
        logits_BV = keep_top_k(logits_BV, how.top_k)
    # Of all tokens, with p = 1, rounding would drop the least likely.
    if how.top_p is not None and how.top_p < 1.0:
        logits_BV = keep_top_p(logits_BV, how.top_p)
    if how.min_p:
        logits_BV = keep_min_p(logits_BV, how.min_p)

    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
