"""Scaled dot-product attention: plain, over a cache, and in causal blocks.

Legend: B batch, T query length, S key length, N heads, K key/value heads, G queries' heads for each
of them, H head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from l1_jax.model.dropout import dropout, kept
from l1_jax.model.layers import einsum_float32

LOWEST = float(np.finfo(np.float32).min)
BLOCK = 64  # queries
ATTENTION = "attention"  # the name by which a remat policy keeps what attention gives


def causal_mask(query_positions_BT: jax.Array | np.ndarray, key_length: int) -> jax.Array:
    """True where a query may look: keys at its own position and before. bool `[B, 1, T, S]`."""
    return (jnp.arange(key_length)[None, None, :] <= query_positions_BT[:, :, None])[:, None]


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: jax.Array,
    rate: float,
    keys_B: jax.Array | None,
    order_T: np.ndarray,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32; each key/value head serves G queries'
    heads, its neighbours.

    Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023 (GQA),
        arXiv:2305.13245, section 2.2.
    `mask` is bool, broadcastable to `[B, N, T, S]`; False is not looked at. `rate`, `keys_B` and
    `order_T`, the order of the queries, drop attention weights, see `dropout`. Returns `[B, T, N,
    H]` in the type of q.
    """
    (rows, length, heads, size), groups = q_BTNH.shape, k_BSKH.shape[2]
    q_BTNH = q_BTNH / math.sqrt(size)
    if groups == heads:
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSKH)
    else:
        q_BTKGH = q_BTNH.reshape(rows, length, groups, -1, size)
        scores_BNTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).reshape(
            rows, heads, length, -1
        )
    scores_BNTS = jnp.where(mask, scores_BNTS.astype(jnp.float32), LOWEST)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, rate, keys_B, order_T, 2)
    if groups == heads:
        return checkpoint_name(jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSKH), ATTENTION)
    weights_BKGTS = weights_BNTS.reshape(rows, groups, -1, length, v_BSKH.shape[1])
    y_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return checkpoint_name(y_BTKGH.reshape(q_BTNH.shape), ATTENTION)


def attend_cache(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_BT: jax.Array
) -> jax.Array:
    """As `attend`, over the slots of a cache up to the query's own position. The dimensions of the
    products are in the order in which XLA on CPU reads the cache as it lies, without a transposed
    copy for every token."""
    rows, length, heads, size = q_BTNH.shape
    q_BKMH = (
        (q_BTNH / math.sqrt(size)).swapaxes(1, 2).reshape(rows, k_BKSH.shape[1], -1, size)
    )  # M: G times T
    scores_BKMS = jnp.einsum("BKSH,BKMH->BKSM", k_BKSH, q_BKMH).swapaxes(2, 3)
    scores_BNTS = scores_BKMS.reshape(rows, heads, length, -1).astype(jnp.float32)
    scores_BNTS = jnp.where(causal_mask(positions_BT, k_BKSH.shape[2]), scores_BNTS, LOWEST)
    weights_BKMS = (
        jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype).reshape(scores_BKMS.shape)
    )
    y_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
    return y_BKMH.reshape(rows, heads, length, size).swapaxes(1, 2)


def attend_in_blocks(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    rate: float,
    keys_B: jax.Array | None,
) -> jax.Array:
    """What `attend` computes for a causal sequence: a block of queries at a time, over the keys up
    to its end.

    Half of the scores are never made, and none is kept for the backward pass, which makes them
    again. Source: Dao et al. 2022 (FlashAttention), arXiv:2205.14135, algorithms 1 and 4, without
    blocks of keys.
    """
    words = None if keys_B is None or rate == 0.0 else jax.random.key_data(keys_B)
    return _attend_in_blocks(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_blocks(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, words):
    return _forward(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, words)[0]


def _forward(rate, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, words):
    rows, length, heads, size = q_BTNH.shape
    k, v = (x.swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
    q = (q_BTNH / math.sqrt(size)).swapaxes(1, 2).reshape(rows, k.shape[1], -1, length, size)
    outputs, logs = [], []
    for start, end in blocks(length):
        scores = _scores(q, k, segment_ids_BT, start, end)
        largest = scores.max(axis=-1, keepdims=True)
        exps = jnp.exp(scores - largest)
        sums = exps.sum(axis=-1, keepdims=True)
        exps = _drop(exps, rate, words, start, end)
        mixed = einsum_float32(
            "BKGTS,BKSH->BKGTH", exps.astype(v.dtype), v[:, :, :end]
        )  # up to T times v
        outputs.append((mixed / sums).astype(v.dtype))
        logs.append(largest + jnp.log(sums))
    output_BTNH = jnp.concatenate(outputs, 3).reshape(rows, heads, length, size).swapaxes(1, 2)
    output_BTNH = checkpoint_name(output_BTNH, ATTENTION)
    logs_BKGT1 = checkpoint_name(jnp.concatenate(logs, 3), ATTENTION)
    return output_BTNH, (q, k, v, output_BTNH, logs_BKGT1, segment_ids_BT, words)


def _backward(rate, kept_for_backward, d_output_BTNH):
    q, k, v, output_BTNH, logs, segment_ids_BT, words = kept_for_backward
    length = q.shape[3]
    d_output = d_output_BTNH.swapaxes(1, 2).reshape(q.shape)
    shared_BTN = (d_output_BTNH.astype(jnp.float32) * output_BTNH).sum(axis=-1)
    shared = shared_BTN.swapaxes(1, 2).reshape(logs.shape)
    d_q, d_k, d_v = [], jnp.zeros(k.shape), jnp.zeros(v.shape)  # sums over the blocks, so float32
    for start, end in blocks(length):
        at, until = (slice(None),) * 3 + (slice(start, end),), (slice(None),) * 2 + (slice(end),)
        weights = jnp.exp(_scores(q, k, segment_ids_BT, start, end) - logs[at])
        d_dropped = einsum_float32("BKGTH,BKSH->BKGTS", d_output[at], v[until])
        d_scores = (weights * (_drop(d_dropped, rate, words, start, end) - shared[at])).astype(
            q.dtype
        )
        dropped = _drop(weights, rate, words, start, end).astype(q.dtype)
        d_q.append(jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k[until]))
        rest = ((0, 0), (0, 0), (0, length - end), (0, 0))
        d_k += jnp.pad(einsum_float32("BKGTS,BKGTH->BKSH", d_scores, q[at]), rest)
        d_v += jnp.pad(einsum_float32("BKGTS,BKGTH->BKSH", dropped, d_output[at]), rest)
    d_q_BTNH = jnp.concatenate(d_q, 3).reshape(d_output_BTNH.swapaxes(1, 2).shape).swapaxes(1, 2)
    d_k_BTKH, d_v_BTKH = (x.swapaxes(1, 2).astype(q.dtype) for x in (d_k, d_v))
    return d_q_BTNH / math.sqrt(q.shape[-1]), d_k_BTKH, d_v_BTKH, None, None


_attend_in_blocks.defvjp(_forward, _backward)


def blocks(length: int) -> list[tuple[int, int]]:
    """The first position of each block and the one after its last: of `BLOCK`, or as many of it as
    make 16 blocks."""
    size = BLOCK * max(1, -(-length // (16 * BLOCK)))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(q_BKGTH, k_BKTH, segment_ids_BT, start, end):
    """Of the queries of a block and all keys before its end, float32 `[B, K, G, end - start,
    end]`."""
    q, k = q_BKGTH[:, :, :, start:end], k_BKTH[:, :, :end]
    scores = einsum_float32("BKGTH,BKSH->BKGTS", q, k)
    mask = (np.arange(end)[None] <= np.arange(start, end)[:, None])[None]
    if segment_ids_BT is not None:
        mask &= segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
    return jnp.where(mask[:, None, None], scores, LOWEST)


def _drop(x_BKGTS, rate, words, start, end):
    """`dropout` of a block's weights, by the mask that `attend` takes for the whole."""
    if words is None:
        return x_BKGTS
    rows, groups, each, *block = x_BKGTS.shape
    keys_B = jax.random.wrap_key_data(words, impl="threefry2x32")
    mask = kept((rows, groups * each, *block), rate, keys_B, np.arange(start, end), 2)
    return jnp.where(mask.reshape(x_BKGTS.shape), x_BKGTS / (1.0 - rate), 0.0)
