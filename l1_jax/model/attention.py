"""Causal self-attention and its key/value cache.

Legend: B batch, T query length, S key length, N heads, K key/value heads, G queries' heads for each
of them, H head size, D model width, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.model.attend import attend, attend_cache, attend_in_blocks, causal_mask
from l1_jax.model.backends import attend_cudnn, attend_splash
from l1_jax.model.context import OF_ATTENTION, OF_WEIGHTS, Context
from l1_jax.model.dropout import dropout
from l1_jax.model.layers import Linear, RMSNorm, projection_stddev, rotate
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain

# A layer's keys and values, [B, K, S, H] each; slot s has those of position s.
Cache = tuple[jax.Array, jax.Array]


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: jnp.dtype) -> list[Cache]:
    """Zeroed keys and values of each layer: `batch` rows of `length` slots."""
    shape = (batch, config.kv_heads, length, config.head_dims)

    def zeros() -> jax.Array:
        return jnp.zeros(shape, dtype)

    return [(zeros(), zeros()) for _ in range(config.n_layers)]


def write(x_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """x with `new` at its positions; those past the end are dropped."""
    # Heads have indices too: of a single index XLA makes a slice update, which on CPU it repeats in
    # what reads the result, and copies all of x for that.
    rows = jnp.arange(x_BKSH.shape[0])
    heads = jnp.arange(x_BKSH.shape[1])
    slots_BKTH = x_BKSH.at[rows[:, None, None], heads[None, :, None], positions_BT[:, None]]
    new_BKTH = new_BTKH.swapaxes(1, 2)
    return slots_BKTH.set(new_BKTH, mode="drop")


class Attention(nnx.Module):
    """Multi-head self-attention.

    The projections are fused: q, k and v, or k and v where they have fewer heads.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, backend: str):
        self.dropout = config.dropout
        self.attention_rate = config.attention_rate
        self.backend = backend

        head_size = config.head_dims
        stddev = config.initializer_range
        width = {"embed": config.n_embd}
        heads = {"heads": config.n_heads, "head": head_size}

        if config.kv_heads == config.n_heads:
            qkv_heads = {"qkv": 3} | heads
            self.qkv = Linear(rngs, width, qkv_heads, stddev=stddev, bias=config.bias)
        else:
            kv_heads = {"qkv": 2, "heads": config.kv_heads, "head": head_size}
            self.q = Linear(rngs, width, heads, stddev=stddev, bias=config.bias)
            self.kv = Linear(rngs, width, kv_heads, stddev=stddev, bias=config.bias)
        self.out = Linear(rngs, heads, width, stddev=projection_stddev(config), bias=config.bias)

        self.q_norm = _head_norm(config)
        self.k_norm = _head_norm(config)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends within x, or, with a cache, over all that it holds after x is written to it.

        Args:
            x_BTD: what looks and is looked at.
            context: of the layer.
            cache: the keys and values so far.

        Returns:
            `[B, T, D]`, and the cache, None without one.
        """
        q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD)
        if self.q_norm and self.k_norm:
            q_BTNH = self.q_norm(q_BTNH)
            k_BTKH = self.k_norm(k_BTKH)
        if context.rotation:
            q_BTNH = rotate(q_BTNH, context.rotation)
            k_BTKH = rotate(k_BTKH, context.rotation)

        if cache is None:
            y_BTNH = self._mix(q_BTNH, k_BTKH, v_BTKH, context)
        else:
            assert context.slots is not None
            k_BKSH, v_BKSH = cache
            k_BKSH = write(k_BKSH, k_BTKH, context.slots)
            v_BKSH = write(v_BKSH, v_BTKH, context.slots)
            cache = (k_BKSH, v_BKSH)
            y_BTNH = attend_cache(q_BTNH, k_BKSH, v_BKSH, context.slots)

        y_BTD = self.out(constrain(y_BTNH, "batch", "length", "heads", None))
        order_T = context.order(x_BTD.shape[1])
        y_BTD = dropout(y_BTD, self.dropout, context.keys(OF_ATTENTION), order_T)
        return y_BTD, cache

    def _project(self, x_BTD):
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`."""
        if hasattr(self, "qkv"):
            qkv = constrain(self.qkv(x_BTD), "batch", "length", None, "heads", None)
            return jnp.unstack(qkv, axis=2)

        kv = constrain(self.kv(x_BTD), "batch", "length", None, "heads", None)
        q_BTNH = constrain(self.q(x_BTD), "batch", "length", "heads", None)
        k_BTKH, v_BTKH = jnp.unstack(kv, axis=2)
        return q_BTNH, k_BTKH, v_BTKH

    def _mix(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, context: Context
    ) -> jax.Array:
        """Causal attention over the positions of x alone, by the backend: `[B, T, N, H]`."""
        segment_ids_BT = context.segment_ids
        keys_B = context.keys(OF_WEIGHTS)

        if self.backend == "cudnn":
            return attend_cudnn(q_BTNH, k_BTKH, v_BTKH)
        if self.backend == "splash":
            return attend_splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        if self.backend == "blocked":
            return attend_in_blocks(
                q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, rate=self.attention_rate, keys_B=keys_B
            )

        order_T = context.order(q_BTNH.shape[1])
        k_BSKH = in_order(k_BTKH, order_T, "heads", None)
        v_BSKH = in_order(v_BTKH, order_T, "heads", None)

        # By the place in the row, not by position, which may begin anew with each document.
        mask = causal_mask(order_T[None], len(order_T))
        if segment_ids_BT is not None:
            query_segments_BT1 = segment_ids_BT[:, :, None]
            key_segments_B1S = in_order(segment_ids_BT, order_T)[:, None, :]
            same_BTS = query_segments_BT1 == key_segments_B1S
            mask &= same_BTS[:, None]
        return attend(
            q_BTNH, k_BSKH, v_BSKH, mask, rate=self.attention_rate, keys_B=keys_B, order_T=order_T
        )


def _head_norm(config: ModelConfig) -> RMSNorm | None:
    """The norm of each head of queries, or of keys, that `model.qk_norm` means.

    Source: Henry et al. 2020, arXiv:2010.04245, section 2, with the learned scales of Qwen3
    (arXiv:2505.09388).
    """
    if not config.qk_norm:
        return None
    return RMSNorm(config.head_dims, config.layer_norm_epsilon, axis="head")


def in_order(x_BT: jax.Array, order_T: np.ndarray, *axes: str | None) -> jax.Array:
    """All positions of x on every device that shares its rows, in their natural order.

    Args:
        x_BT: `[B, T, *axes]`.
        order_T: the order in which the positions lie.
        axes: names of the dimensions after the first two.
    """
    x_BT = constrain(x_BT, "batch", None, *axes)
    is_natural = (order_T == np.arange(len(order_T))).all()
    return x_BT if is_natural else x_BT[:, np.argsort(order_T)]
