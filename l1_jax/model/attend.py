"""Scaled dot-product attention: plain, over a cache, and in causal blocks.

Legend: B batch, T query length, S key length, N heads, K key/value heads, G queries' heads for each
of them, M queries for each of them (G times T), H head size.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from l1_jax.model.dropout import dropout, kept
from l1_jax.model.layers import einsum_float32

LOWEST = float(np.finfo(np.float32).min)

# Queries of a block, at the least.
BLOCK = 64

# The name by which a remat policy keeps what attention gives.
ATTENTION = "attention"


def causal_mask(query_positions_BT: jax.Array | np.ndarray, key_length: int) -> jax.Array:
    """True where a query may look: keys at its own position and before. bool `[B, 1, T, S]`."""
    key_positions = jnp.arange(key_length)[None, None, :]
    return (key_positions <= query_positions_BT[:, :, None])[:, None]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: jax.Array,
    rate: float,
    keys_B: jax.Array | None,
    order_T: np.ndarray,
) -> jax.Array:
    """Scaled dot-product attention, its softmax in float32.

    Each key/value head serves the heads of G queries, which are neighbours.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        mask: bool, broadcastable to `[B, N, T, S]`; False is not looked at.
        rate: of dropped attention weights, see `dropout`.
        keys_B: a key for each row, of dropout; None drops nothing.
        order_T: the order of the queries, by which dropout goes.

    Returns:
        `[B, T, N, H]` in the type of q.

    Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023 (GQA),
    arXiv:2305.13245, section 2.2.
    """
    head_size = q_BTNH.shape[-1]
    scores_BNTS = _scores(q_BTNH / math.sqrt(head_size), k_BSKH)
    scores_BNTS = jnp.where(mask, scores_BNTS.astype(jnp.float32), LOWEST)

    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, rate, keys_B, order_T, axis=2)

    y_BTNH = _weighted_sum(weights_BNTS, v_BSKH)
    return checkpoint_name(y_BTNH, ATTENTION)


def _scores(q_BTNH, k_BSKH):
    """The product of each query with each key, `[B, N, T, S]`."""
    rows, length, heads, head_size = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    if kv_heads == heads:
        return jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSKH)

    q_BTKGH = q_BTNH.reshape(rows, length, kv_heads, -1, head_size)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    return scores_BKGTS.reshape(rows, heads, length, -1)


def _weighted_sum(weights_BNTS, v_BSKH):
    """The values, summed with each query's weights, `[B, T, N, H]`."""
    rows, heads, length, key_length = weights_BNTS.shape
    kv_heads, head_size = v_BSKH.shape[2:]
    if kv_heads == heads:
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSKH)

    weights_BKGTS = weights_BNTS.reshape(rows, kv_heads, -1, length, key_length)
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return y_BTKGH.reshape(rows, length, heads, head_size)


def attend_cache(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """As `attend`, over the slots of a cache up to the query's own position.

    The dimensions of the products are in the order in which XLA on CPU reads the cache as it lies,
    without a transposed copy for every token.

    Args:
        q_BTNH: queries.
        k_BKSH: keys of the cache.
        v_BKSH: values of the cache.
        positions_BT: int32, of the queries.
    """
    rows, length, heads, head_size = q_BTNH.shape
    _, kv_heads, num_slots, _ = k_BKSH.shape

    q_BNTH = (q_BTNH / math.sqrt(head_size)).swapaxes(1, 2)
    q_BKMH = q_BNTH.reshape(rows, kv_heads, -1, head_size)
    scores_BKMS = jnp.einsum("BKSH,BKMH->BKSM", k_BKSH, q_BKMH).swapaxes(2, 3)

    scores_BNTS = scores_BKMS.reshape(rows, heads, length, -1).astype(jnp.float32)
    mask = causal_mask(positions_BT, num_slots)
    scores_BNTS = jnp.where(mask, scores_BNTS, LOWEST)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)

    weights_BKMS = weights_BNTS.reshape(scores_BKMS.shape)
    y_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
    y_BNTH = y_BKMH.reshape(rows, heads, length, head_size)
    return y_BNTH.swapaxes(1, 2)


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    rate: float,
    keys_B: jax.Array | None,
) -> jax.Array:
    """What `attend` computes for a causal sequence, a block of queries at a time.

    Each block goes over the keys up to its end, so half of the scores are never made. None is kept
    for the backward pass, which makes them again.

    Args:
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segment_ids_BT: attention stays among equal ones; None: all is one document.
        rate: of dropped attention weights.
        keys_B: a key for each row, of dropout; None drops nothing.

    Source: Dao et al. 2022 (FlashAttention), arXiv:2205.14135, algorithms 1 and 4, without blocks
    of keys.
    """
    key_words = None
    if keys_B is not None and rate > 0.0:
        key_words = jax.random.key_data(keys_B)
    return _attend_in_blocks(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, key_words)


class QueryBlock(NamedTuple):
    """The queries at the positions from `start` to before `end`."""

    start: int
    end: int

    def queries(self, x_BKGT: jax.Array) -> jax.Array:
        """Its own part of `[B, K, G, T, ...]`."""
        return x_BKGT[:, :, :, self.start : self.end]

    def keys(self, x_BKSH: jax.Array) -> jax.Array:
        """The part of `[B, K, S, H]` at which it may look: all before its end."""
        return x_BKSH[:, :, : self.end]


def blocks(length: int) -> list[QueryBlock]:
    """The blocks of a sequence: of `BLOCK` queries, or as many times that as make 16 blocks."""
    multiple = max(1, -(-length // (16 * BLOCK)))
    size = BLOCK * multiple
    starts = range(0, length, size)
    return [QueryBlock(start, end=min(start + size, length)) for start in starts]


class _Residuals(NamedTuple):
    """What the backward pass of `_attend_in_blocks` needs."""

    q: jax.Array  # [B, K, G, T, H], over sqrt(H)
    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]
    output: jax.Array  # [B, T, N, H]
    logs: jax.Array  # [B, K, G, T, 1], of the sums of a query's exponentials
    segment_ids: jax.Array | None  # [B, T]
    key_words: jax.Array | None  # of dropout, uint32 [B, 2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_blocks(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, key_words):
    output_BTNH, _ = _forward(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, key_words)
    return output_BTNH


def _forward(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, key_words):
    """The output, `[B, T, N, H]`, and what its gradient needs."""
    rows, length, heads, head_size = q_BTNH.shape
    k_BKSH = k_BTKH.swapaxes(1, 2)
    v_BKSH = v_BTKH.swapaxes(1, 2)
    q_BNTH = (q_BTNH / math.sqrt(head_size)).swapaxes(1, 2)
    q_BKGTH = q_BNTH.reshape(rows, k_BKSH.shape[1], -1, length, head_size)

    outputs = []
    logs = []
    for block in blocks(length):
        scores = _block_scores(q_BKGTH, k_BKSH, segment_ids_BT, block)
        largest = scores.max(axis=-1, keepdims=True)
        exps = jnp.exp(scores - largest)
        sums = exps.sum(axis=-1, keepdims=True)

        # The sums are of all weights, also of those that are dropped. Before it is divided by them
        # a mixture is up to T times a value, so it is float32.
        exps = _drop(exps, rate, key_words, block).astype(v_BKSH.dtype)
        mixture = einsum_float32("BKGTS,BKSH->BKGTH", exps, block.keys(v_BKSH))
        outputs.append((mixture / sums).astype(v_BKSH.dtype))
        logs.append(largest + jnp.log(sums))

    output_BNTH = jnp.concatenate(outputs, axis=3).reshape(rows, heads, length, head_size)
    output_BTNH = checkpoint_name(output_BNTH.swapaxes(1, 2), ATTENTION)
    logs_BKGT1 = checkpoint_name(jnp.concatenate(logs, axis=3), ATTENTION)
    residuals = _Residuals(
        q_BKGTH, k_BKSH, v_BKSH, output_BTNH, logs_BKGT1, segment_ids_BT, key_words
    )
    return output_BTNH, residuals


def _backward(rate, residuals, d_output_BTNH):
    """The gradients of q, k and v; segments and keys have none."""
    q_BKGTH, k_BKSH, v_BKSH, output_BTNH, logs_BKGT1, segment_ids_BT, key_words = residuals
    rows, length, heads, head_size = d_output_BTNH.shape
    dtype = q_BKGTH.dtype
    d_output_BKGTH = d_output_BTNH.swapaxes(1, 2).reshape(q_BKGTH.shape)

    # The softmax takes the same from all that come back to a query's scores.
    shared_BTN = (d_output_BTNH.astype(jnp.float32) * output_BTNH).sum(axis=-1)
    shared_BKGT1 = shared_BTN.swapaxes(1, 2).reshape(logs_BKGT1.shape)

    # Keys and values are summed over the blocks, so in float32.
    d_q_blocks = []
    d_k_BKSH = jnp.zeros(k_BKSH.shape)
    d_v_BKSH = jnp.zeros(v_BKSH.shape)
    for block in blocks(length):
        scores = _block_scores(q_BKGTH, k_BKSH, segment_ids_BT, block)
        weights = jnp.exp(scores - block.queries(logs_BKGT1))

        d_dropped = einsum_float32(
            "BKGTH,BKSH->BKGTS", block.queries(d_output_BKGTH), block.keys(v_BKSH)
        )
        d_weights = _drop(d_dropped, rate, key_words, block)
        d_scores = (weights * (d_weights - block.queries(shared_BKGT1))).astype(dtype)
        dropped = _drop(weights, rate, key_words, block).astype(dtype)

        d_q_block = jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, block.keys(k_BKSH))
        d_q_blocks.append(d_q_block)

        # The block did not look at keys past its end.
        past_end = ((0, 0), (0, 0), (0, length - block.end), (0, 0))
        d_k_block = einsum_float32("BKGTS,BKGTH->BKSH", d_scores, block.queries(q_BKGTH))
        d_k_BKSH += jnp.pad(d_k_block, past_end)
        d_v_block = einsum_float32("BKGTS,BKGTH->BKSH", dropped, block.queries(d_output_BKGTH))
        d_v_BKSH += jnp.pad(d_v_block, past_end)

    d_q_BNTH = jnp.concatenate(d_q_blocks, axis=3).reshape(rows, heads, length, head_size)
    d_q_BTNH = d_q_BNTH.swapaxes(1, 2)
    d_k_BTKH = d_k_BKSH.swapaxes(1, 2).astype(dtype)
    d_v_BTKH = d_v_BKSH.swapaxes(1, 2).astype(dtype)
    return d_q_BTNH / math.sqrt(head_size), d_k_BTKH, d_v_BTKH, None, None


_attend_in_blocks.defvjp(_forward, _backward)


def _block_scores(q_BKGTH, k_BKSH, segment_ids_BT, block):
    """Of a block's queries and all keys before its end, float32 `[B, K, G, end - start, end]`."""
    start, end = block
    scores = einsum_float32("BKGTH,BKSH->BKGTS", block.queries(q_BKGTH), block.keys(k_BKSH))

    query_positions = np.arange(start, end)[:, None]
    key_positions = np.arange(end)[None]
    mask = (key_positions <= query_positions)[None]
    if segment_ids_BT is not None:
        query_segments = segment_ids_BT[:, start:end, None]
        key_segments = segment_ids_BT[:, None, :end]
        mask &= query_segments == key_segments

    return jnp.where(mask[:, None, None], scores, LOWEST)


def _drop(x_BKGTS, rate, key_words, block):
    """`dropout` of a block's weights, by the mask that `attend` takes for the whole."""
    if key_words is None:
        return x_BKGTS

    rows, kv_heads, group, queries, keys = x_BKGTS.shape
    keys_B = jax.random.wrap_key_data(key_words, impl="threefry2x32")
    positions = np.arange(block.start, block.end)
    mask = kept((rows, kv_heads * group, queries, keys), rate, keys_B, positions, axis=2)
    return jnp.where(mask.reshape(x_BKGTS.shape), x_BKGTS / (1.0 - rate), 0.0)
