"""Causal self-attention, its mask and its key/value cache.

Legend: B batch, T query length, S key length, N heads, K key/value heads, G queries' heads for each of
them, H head size, D model width, L layers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.config import ModelConfig
from l1_jax.model.layers import Linear, RMSNorm, Rotation, dropout, fold_in, projection_stddev, rotate
from l1_jax.parallel.sharding import constrain

Cache = tuple[jax.Array, jax.Array]  # keys and values of a layer, [B, S, K, H]; slot s is of position s


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """Zeroed keys and values of all layers, each `[L, B, S, K, H]`."""
    shape = (config.n_layers, batch, length, config.kv_heads, config.n_embd // config.n_heads)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)


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
    """Scaled dot-product attention, softmax in float32; each key/value head serves G queries' heads, its neighbours.

    Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023 (GQA), arXiv:2305.13245, section 2.2.
    `mask` is bool, broadcastable to `[B, N, T, S]`; False is not looked at. `rate`, `keys_B` and `order_T`, the order
    of the queries, drop attention weights, see `layers.dropout`. Returns `[B, T, N, H]` in the type of q.
    """
    (rows, length, heads, size), groups = q_BTNH.shape, k_BSKH.shape[2]
    q_BTNH = q_BTNH / math.sqrt(size)
    if groups == heads:
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSKH)
    else:
        q_BTKGH = q_BTNH.reshape(rows, length, groups, -1, size)
        scores_BNTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH).reshape(rows, heads, length, -1)
    scores_BNTS = jnp.where(mask, scores_BNTS.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(q_BTNH.dtype)
    weights_BNTS = dropout(weights_BNTS, rate, keys_B, order_T, 2)
    if groups == heads:
        return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSKH)
    weights_BKGTS = weights_BNTS.reshape(rows, groups, -1, length, v_BSKH.shape[1])
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(q_BTNH.shape)


class Attention(nnx.Module):
    """Multi-head self-attention. The projections are fused: q, k and v, or k and v where they have fewer heads."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.dropout = config.dropout
        stddev, size = config.initializer_range, config.n_embd // config.n_heads
        width, heads = {"embed": config.n_embd}, {"heads": config.n_heads, "head": size}
        if config.kv_heads == config.n_heads:
            self.qkv = Linear(rngs, width, {"qkv": 3} | heads, stddev, config.bias)
        else:
            self.q = Linear(rngs, width, heads, stddev, config.bias)
            self.kv = Linear(rngs, width, {"qkv": 2, "heads": config.kv_heads, "head": size}, stddev, config.bias)
        self.out = Linear(rngs, heads, width, projection_stddev(config), config.bias)
        # Source: Henry et al. 2020, arXiv:2010.04245, section 2, with the learned scales of Qwen3 (arXiv:2505.09388).
        self.q_norm = RMSNorm(size, config.layer_norm_epsilon, "head") if config.qk_norm else None
        self.k_norm = RMSNorm(size, config.layer_norm_epsilon, "head") if config.qk_norm else None

    def __call__(
        self,
        x_BTD,
        order_T,
        segment_ids_BT=None,
        keys_B=None,
        cache: Cache | None = None,
        positions_BT=None,
        turn: Rotation | None = None,
    ):
        """Attends within x, or, with a cache, over all that the cache holds after x is written to it. `turn` rotates
        queries and keys."""
        q_BTNH, k_BSKH, v_BSKH = self._project(x_BTD)
        if self.q_norm and self.k_norm:
            q_BTNH, k_BSKH = self.q_norm(q_BTNH), self.k_norm(k_BSKH)
        if turn:
            q_BTNH, k_BSKH = rotate(q_BTNH, turn), rotate(k_BSKH, turn)
        if cache is None:
            k_BSKH, v_BSKH = (in_order(x, order_T, "heads", None) for x in (k_BSKH, v_BSKH))
            mask = causal_mask(order_T[None], len(order_T))  # not by position, which may begin anew with each document
            if segment_ids_BT is not None:
                mask &= (segment_ids_BT[:, :, None] == in_order(segment_ids_BT, order_T)[:, None, :])[:, None]
        else:
            rows = jnp.arange(x_BTD.shape[0])[:, None]
            k_BSKH = cache[0].at[rows, positions_BT].set(k_BSKH, mode="drop")
            v_BSKH = cache[1].at[rows, positions_BT].set(v_BSKH, mode="drop")
            cache, mask = (k_BSKH, v_BSKH), causal_mask(positions_BT, cache[0].shape[1])
        y_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask, self.dropout, fold_in(keys_B, 0), order_T)
        y_BTD = self.out(constrain(y_BTNH, "batch", "length", "heads", None))
        return dropout(y_BTD, self.dropout, fold_in(keys_B, 1), order_T), cache

    def _project(self, x_BTD):
        """Queries, keys and values."""
        if hasattr(self, "qkv"):
            qkv = constrain(self.qkv(x_BTD), "batch", "length", None, "heads", None)
            return qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        kv = constrain(self.kv(x_BTD), "batch", "length", None, "heads", None)
        return constrain(self.q(x_BTD), "batch", "length", "heads", None), kv[:, :, 0], kv[:, :, 1]


def in_order(x_BT: jax.Array, order_T: np.ndarray, *axes: str | None) -> jax.Array:
    """All positions of x `[B, T, *axes]` on every device that shares its rows, and in their natural order."""
    x_BT = constrain(x_BT, "batch", None, *axes)
    return x_BT if (order_T == np.arange(len(order_T))).all() else x_BT[:, np.argsort(order_T)]
