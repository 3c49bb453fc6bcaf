"""From logits to the next token.

Legend: B batch, V vocabulary (padded).
"""

import jax
import jax.numpy as jnp

from l1_jax.inference.section import GenerationConfig

LOWEST = jnp.finfo(jnp.float32).min


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
    """Makes tokens in the text less likely. Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858,
    section 4.1."""
    lowered = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, lowered, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Drops all but the k likeliest tokens."""
    smallest = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
    return jnp.where(logits_BV < smallest, LOWEST, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens whose probabilities sum to p. Source: Holtzman et al. 2019,
    arXiv:1904.09751, eq. 2."""
    descending = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = (
        jnp.cumsum(probabilities, axis=-1) - probabilities
    )  # 0 at the first, which is always kept
    smallest = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < smallest, LOWEST, logits_BV)


def keep_min_p(logits_BV: jax.Array, p: float) -> jax.Array:
    """Drops tokens less likely than p times the likeliest. Source: Nguyen et al. 2024,
    arXiv:2407.01082, section 3."""
    return jnp.where(
        logits_BV < logits_BV.max(axis=-1, keepdims=True) + jnp.log(p), LOWEST, logits_BV
    )


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, seen_BV: jax.Array | None, how: GenerationConfig
) -> jax.Array:
    """The next token of each row, int32 `[B]`, from float32 logits; the filters act in the order of
    this function. Each row has its own key, so neighbours do not matter. `seen_BV` (bool) marks the
    tokens already in the text, which a repetition penalty needs."""
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, how.repetition_penalty)
    if how.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / how.temperature
    if how.top_k is not None:
        logits_BV = keep_top_k(logits_BV, how.top_k)
    if how.top_p is not None:
        logits_BV = keep_top_p(logits_BV, how.top_p)
    if how.min_p:
        logits_BV = keep_min_p(logits_BV, how.min_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
