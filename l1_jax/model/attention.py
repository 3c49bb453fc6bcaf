"""Causal self-attention, its mask and its key/value cache.

Legend: B batch, T query length, S key length, N heads, H head size, D model width, L layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.config import ModelConfig
from l1_jax.model.layers import Linear, dropout, fold_in
from l1_jax.parallel.sharding import constrain

Cache = tuple[jax.Array, jax.Array]  # keys and values of a layer, [B, N, S, H]; slot s is of position s


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[Cache]:
    """Zeroed keys and values of each layer."""
    shape = (batch, config.n_heads, length, config.n_embd // config.n_heads)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)]


def write(x_BNSH: jax.Array, new_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """x with `new` at its positions, those past the end dropped. Heads have indices too: of a single index XLA makes a
    slice update, which on CPU it repeats in what reads the result, and copies all of x for that."""
    rows, heads = (jnp.arange(size) for size in x_BNSH.shape[:2])
    at = x_BNSH.at[rows[:, None, None], heads[None, :, None], positions_BT[:, None]]
    return at.set(new_BTNH.swapaxes(1, 2), mode="drop")


def causal_mask(query_positions_BT: jax.Array | np.ndarray, key_length: int) -> jax.Array:
    """True where a query may look: keys at its own position and before. bool `[B, 1, T, S]`."""
    return (jnp.arange(key_length)[None, None, :] <= query_positions_BT[:, :, None])[:, None]


def attend(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    mask: jax.Array,
    rate: float,
    keys_B: jax.Array | None,
    order_T: np.ndarray,
) -> jax.Array:
    """Scaled dot-product attention, softmax in float32. Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.

    `mask` is bool, broadcastable to `[B, N, T, S]`; False is not looked at. `rate`, `keys_B` and `order_T`, the order
    of the queries, drop attention weights, see `layers.dropout`. Returns `[B, T, N, H]` in the type of q.
    """
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH / math.sqrt(q_BTNH.shape[-1]), k_BSNH)
    weights_BNTS = masked_softmax(scores_BNTS, mask)
    return jnp.einsum("BNTS,BSNH->BTNH", dropout(weights_BNTS, rate, keys_B, order_T, 2), v_BSNH)


def attend_cache(q_BTNH: jax.Array, cache: Cache, positions_BT: jax.Array) -> jax.Array:
    """As `attend`, over the slots of a cache up to the query's own position. The dimensions of the products are in the
    order in which XLA on CPU reads the cache as it lies, without a transposed copy for every token."""
    k_BNSH, v_BNSH = cache
    scores_BNST = jnp.einsum("BNSH,BTNH->BNST", k_BNSH, q_BTNH / math.sqrt(q_BTNH.shape[-1]))
    weights_BNTS = masked_softmax(scores_BNST.swapaxes(2, 3), causal_mask(positions_BT, k_BNSH.shape[2]))
    return jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH).swapaxes(1, 2)


def masked_softmax(scores_BNTS: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over S in float32, of what is True in `mask`; the result is in the type of the scores."""
    masked_BNTS = jnp.where(mask, scores_BNTS.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(masked_BNTS, axis=-1).astype(scores_BNTS.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention with fused query, key and value projections."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.dropout = config.dropout
        width, heads = {"embed": config.n_embd}, {"heads": config.n_heads, "head": config.n_embd // config.n_heads}
        self.qkv = Linear(rngs, width, {"qkv": 3} | heads, config.initializer_range)
        self.out = Linear(rngs, heads, width, config.initializer_range / math.sqrt(2 * config.n_layers))

    def __call__(self, x_BTD, order_T, segment_ids_BT=None, keys_B=None, cache: Cache | None = None, positions_BT=None):
        """Attends within x, or, with a cache, over all that the cache holds after x is written to it."""
        qkv = constrain(self.qkv(x_BTD), "batch", "length", None, "heads", None)
        q_BTNH, k_BSNH, v_BSNH = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if cache is None:
            k_BSNH, v_BSNH = (in_order(x, order_T, "heads", None) for x in (k_BSNH, v_BSNH))
            mask = causal_mask(order_T[None], len(order_T))  # not by position, which may begin anew with each document
            if segment_ids_BT is not None:
                mask &= (segment_ids_BT[:, :, None] == in_order(segment_ids_BT, order_T)[:, None, :])[:, None]
            y_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, mask, self.dropout, fold_in(keys_B, 0), order_T)
        else:
            cache = write(cache[0], k_BSNH, positions_BT), write(cache[1], v_BSNH, positions_BT)
            y_BTNH = attend_cache(q_BTNH, cache, positions_BT)
        y_BTD = self.out(constrain(y_BTNH, "batch", "length", "heads", None))
        return dropout(y_BTD, self.dropout, fold_in(keys_B, 1), order_T), cache


def in_order(x_BT: jax.Array, order_T: np.ndarray, *axes: str | None) -> jax.Array:
    """All positions of x `[B, T, *axes]` on every device that shares its rows, and in their natural order."""
    x_BT = constrain(x_BT, "batch", None, *axes)
    return x_BT if (order_T == np.arange(len(order_T))).all() else x_BT[:, np.argsort(order_T)]
