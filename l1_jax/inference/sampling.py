"""From logits to the next token, each row by settings of its own.

Legend: B batch, V vocabulary (padded).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l1_jax.inference.section import GenerationConfig

# The float32 numbers from SMALLEST to HIGHEST are computed with everywhere: XLA takes smaller ones
# for 0.
SMALLEST = float(np.finfo(np.float32).tiny)
HIGHEST = float(np.finfo(np.float32).max)
LOWEST = float(np.finfo(np.float32).min)

# What leaves every token, beside a temperature of 0, which is greedy, and a penalty of 1.
KEEP_ANY_K = np.iinfo(np.int32).max
KEEP_ANY_P = math.inf
KEEP_ANY_MIN_P = -math.inf


class Sampling(NamedTuple):
    """How the next token of each row is chosen: arrays `[B]`, so other values compile nothing.

    Attributes:
        temperature: float32, divides the logits; 0 takes the likeliest token.
        top_k: int32, so many of the likeliest are kept; the vocabulary's size or more keeps all.
        top_p: float32, the likeliest that sum to it are kept; infinity keeps all.
        log_min_p: float32, the log of the share of the likeliest's probability below which a token
            is dropped; minus infinity keeps all.
        repetition_penalty: float32, for tokens in the text; 1 changes nothing.
        seed: uint32, of the draws.
        number: int32, of the sample: those of one seed and prompt differ by it.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    log_min_p: jax.Array
    repetition_penalty: jax.Array
    seed: jax.Array
    number: jax.Array

    @classmethod
    def of(
        cls, settings: Sequence[GenerationConfig], seeds: Sequence[int], numbers: Sequence[int]
    ) -> "Sampling":
        """The arrays of these settings, on the host.

        Args:
            settings: of each row.
            seeds: of each row, from 0 to 2^32 - 1.
            numbers: of each row's sample.
        """
        arrays: Any = {
            "temperature": _float32(_temperature(how.temperature) for how in settings),
            "top_k": np.array(
                [min(how.top_k or KEEP_ANY_K, KEEP_ANY_K) for how in settings], np.int32
            ),
            "top_p": _float32(_top_p(how.top_p) for how in settings),
            "log_min_p": _float32(
                math.log(how.min_p) if how.min_p else KEEP_ANY_MIN_P for how in settings
            ),
            "repetition_penalty": _float32(
                min(max(how.repetition_penalty, SMALLEST), HIGHEST) for how in settings
            ),
            "seed": np.array(seeds, np.uint32),
            "number": np.array(numbers, np.int32),
        }
        return cls(**arrays)


def _float32(values: Iterable[float]) -> np.ndarray:
    return np.array(list(values), np.float32)


def _temperature(temperature: float) -> float:
    """As float32 can have it; what it cannot, for smallness, is greedy."""
    return 0.0 if temperature < SMALLEST else min(temperature, HIGHEST)


def _top_p(p: float | None) -> float:
    """Of all tokens, with p = 1, rounding would drop the least likely: it keeps any."""
    return KEEP_ANY_P if p is None or p >= 1.0 else max(p, SMALLEST)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array) -> jax.Array:
    """Makes tokens in the text less likely.

    Args:
        logits_BV: float32.
        seen_BV: bool; true for tokens in the text.
        penalty_B: above 1 they become less likely.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1.
    """
    penalty_B1 = penalty_B[:, None]
    lowered_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, jnp.clip(lowered_BV, LOWEST, HIGHEST), logits_BV)


def smallest_of_k_and_p(logits_BV: jax.Array, k_B: jax.Array, p_B: jax.Array) -> jax.Array:
    """The least logit, `[B, 1]`, of the k likeliest tokens and then of the fewest that sum to p.

    What is as likely as the last one is kept too. One sort serves both.

    Args:
        logits_BV: float32.
        k_B: int32, 1 or more.
        p_B: float32, above 0.

    Source: Holtzman et al. 2019, arXiv:1904.09751, eq. 2, of top-p.
    """
    descending_BV = sort_descending(logits_BV)
    last_B1 = jnp.minimum(k_B, logits_BV.shape[-1])[:, None] - 1
    smallest_of_k_B1 = jnp.take_along_axis(descending_BV, last_B1, axis=-1)

    def smallest_of_p() -> jax.Array:
        likeliest_BV = drop_below(descending_BV, smallest_of_k_B1)
        probabilities_BV = jax.nn.softmax(likeliest_BV, axis=-1)

        # What likelier tokens sum to: 0 at the first, which is always kept.
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = jnp.where(before_BV < p_B[:, None], likeliest_BV, jnp.inf)
        smallest_B1 = jnp.min(kept_BV, axis=-1, keepdims=True)
        return jnp.maximum(smallest_of_k_B1, smallest_B1)

    return jax.lax.cond((p_B < KEEP_ANY_P).any(), smallest_of_p, lambda: smallest_of_k_B1)


def sort_descending(x: jax.Array) -> jax.Array:
    """float32 along its last dimension, the largest first.

    As integers of the same order, which XLA on CPU sorts three times as fast.
    """

    def reorder(bits: jax.Array) -> jax.Array:
        # Of two negative numbers the one with larger bits is smaller. Twice makes the bits again.
        return jnp.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)

    ascending = reorder(jax.lax.bitcast_convert_type(x, jnp.int32))
    descending = ~jnp.sort(~ascending, axis=-1, stable=False)
    return jax.lax.bitcast_convert_type(reorder(descending), jnp.float32)


def smallest_of_min_p(logits_BV: jax.Array, log_p_B: jax.Array) -> jax.Array:
    """The logit of p times the likeliest's probability, `[B, 1]`; `log_p_B` is the log of p.

    Source: Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    return logits_BV.max(axis=-1, keepdims=True) + log_p_B[:, None]


def drop_below(logits_BV: jax.Array, smallest_B1: jax.Array) -> jax.Array:
    """The logits; the lowest float32 for those less than the smallest that is kept."""
    return jnp.where(logits_BV < smallest_B1, LOWEST, logits_BV)


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, positions_B: jax.Array
) -> jax.Array:
    """The next token of each row, int32 `[B]`; the filters act in the order of these functions.

    A token whose logit is the lowest float32, as padding's is, or less, is never drawn. A sort, a
    draw and the search of the likeliest token are made where a row asks for them.

    Args:
        logits_BV: float32.
        seen_BV: bool; marks the tokens already in the text, for the repetition penalty.
        sampling: of each row.
        positions_B: int32, of the tokens that the logits are of. A draw depends on it and on the
            row's seed and number: never on its neighbours.
    """
    possible_BV = logits_BV > LOWEST
    logits_BV = jnp.minimum(logits_BV, HIGHEST)

    logits_BV = penalise(logits_BV, seen_BV, sampling.repetition_penalty)
    logits_BV = jnp.where(possible_BV, logits_BV, -jnp.inf)

    is_random_B = sampling.temperature > 0.0
    none_B = jnp.zeros_like(positions_B)

    likeliest_B = jax.lax.cond(
        is_random_B.all(), lambda: none_B, lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    )
    drawn_B = jax.lax.cond(
        is_random_B.any(), lambda: _draw(logits_BV, sampling, positions_B), lambda: none_B
    )
    return jnp.where(is_random_B, drawn_B, likeliest_B)


def _draw(logits_BV: jax.Array, sampling: Sampling, positions_B: jax.Array) -> jax.Array:
    """A token of each row by chance, int32 `[B]`; those of greedy rows mean nothing."""
    is_random_B = sampling.temperature > 0.0
    temperature_B1 = jnp.where(is_random_B, sampling.temperature, 1.0)[:, None]

    # Of differences to the largest, which stays 0: whatever the temperature, nothing is infinite
    # that is possible.
    largest_B1 = jnp.maximum(logits_BV.max(axis=-1, keepdims=True), LOWEST)
    scaled_BV = jnp.maximum(logits_BV - largest_B1, LOWEST) / temperature_B1
    logits_BV = jnp.where(logits_BV > -jnp.inf, scaled_BV, -jnp.inf)

    # Each filter leaves what is as likely as its last, so the strictest one decides.
    smallest_B1 = smallest_of_min_p(logits_BV, sampling.log_min_p)
    keeps_some_B = (sampling.top_k < logits_BV.shape[-1]) | (sampling.top_p < KEEP_ANY_P)
    smallest_B1 = jax.lax.cond(
        (is_random_B & keeps_some_B).any(),
        lambda: jnp.maximum(
            smallest_B1, smallest_of_k_and_p(logits_BV, sampling.top_k, sampling.top_p)
        ),
        lambda: smallest_B1,
    )
    logits_BV = drop_below(logits_BV, smallest_B1)

    def key(seed: jax.Array, number: jax.Array, position: jax.Array) -> jax.Array:
        of_sample = jax.random.fold_in(jax.random.key(seed), number)
        return jax.random.fold_in(of_sample, position)

    keys_B = jax.vmap(key)(sampling.seed, sampling.number, positions_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
