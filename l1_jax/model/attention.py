"""Causal self-attention and its key/value cache.

Legend: B batch, T query length, S key length, N heads, K key/value heads, G queries' heads for each of
them, H head size, D model width, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.model.attend import attend, attend_cache, attend_in_blocks, causal_mask
from l1_jax.model.backends import attend_cudnn, attend_splash
from l1_jax.model.dropout import dropout, fold_in
from l1_jax.model.layers import Linear, RMSNorm, Rotation, projection_stddev, rotate
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain

Cache = tuple[jax.Array, jax.Array]  # keys and values of a layer, [B, K, S, H]; slot s is of position s


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[Cache]:
    """Zeroed keys and values of each layer."""
    shape = (batch, config.kv_heads, length, config.n_embd // config.n_heads)
    return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.n_layers)]


def write(x_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """x with `new` at its positions, those past the end dropped. Heads have indices too: of a single index XLA makes a
    slice update, which on CPU it repeats in what reads the result, and copies all of x for that."""
    rows, heads = (jnp.arange(size) for size in x_BKSH.shape[:2])
    at = x_BKSH.at[rows[:, None, None], heads[None, :, None], positions_BT[:, None]]
    return at.set(new_BTKH.swapaxes(1, 2), mode="drop")


class Attention(nnx.Module):
    """Multi-head self-attention. The projections are fused: q, k and v, or k and v where they have fewer heads."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, backend: str):
        self.dropout, self.backend = config.dropout, backend
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
            y_BTNH = self._mix(q_BTNH, k_BSKH, v_BSKH, order_T, segment_ids_BT, fold_in(keys_B, 0))
        else:
            cache = write(cache[0], k_BSKH, positions_BT), write(cache[1], v_BSKH, positions_BT)
            y_BTNH = attend_cache(q_BTNH, *cache, positions_BT)
        y_BTD = self.out(constrain(y_BTNH, "batch", "length", "heads", None))
        return dropout(y_BTD, self.dropout, fold_in(keys_B, 1), order_T), cache

    def _mix(self, q_BTNH, k_BTKH, v_BTKH, order_T, segment_ids_BT, keys_B):
        """Causal attention over the positions of x alone, by the backend."""
        if self.backend == "cudnn":
            return attend_cudnn(q_BTNH, k_BTKH, v_BTKH)
        if self.backend == "splash":
            return attend_splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        if self.backend == "blocked":
            return attend_in_blocks(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, self.dropout, keys_B)
        k_BSKH, v_BSKH = (in_order(x, order_T, "heads", None) for x in (k_BTKH, v_BTKH))
        mask = causal_mask(order_T[None], len(order_T))  # not by position, which may begin anew with each document
        if segment_ids_BT is not None:
            mask &= (segment_ids_BT[:, :, None] == in_order(segment_ids_BT, order_T)[:, None, :])[:, None]
        return attend(q_BTNH, k_BSKH, v_BSKH, mask, self.dropout, keys_B, order_T)

    def _project(self, x_BTD):
        """Queries, keys and values."""
        if hasattr(self, "qkv"):
            qkv = constrain(self.qkv(x_BTD), "batch", "length", None, "heads", None)
            return jnp.unstack(qkv, axis=2)
        kv = constrain(self.kv(x_BTD), "batch", "length", None, "heads", None)
        return constrain(self.q(x_BTD), "batch", "length", "heads", None), *jnp.unstack(kv, axis=2)


def in_order(x_BT: jax.Array, order_T: np.ndarray, *axes: str | None) -> jax.Array:
    """All positions of x `[B, T, *axes]` on every device that shares its rows, and in their natural order."""
    x_BT = constrain(x_BT, "batch", None, *axes)
    return x_BT if (order_T == np.arange(len(order_T))).all() else x_BT[:, np.argsort(order_T)]
