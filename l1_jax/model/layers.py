"""The parts of a block: linear maps, norms, the MLP, dropout.

Each parameter carries the names of its dimensions (`axes`), which `parallel.sharding.RULES` maps to the mesh.
Parameters are float32; each layer computes in the type of its input.

Legend: B batch, T length, D model width, F hidden width.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.config import ModelConfig
from l1_jax.parallel.sharding import constrain


def normal_param(rngs: nnx.Rngs, dims: dict[str, int], stddev: float) -> nnx.Param:
    """Normal(0, stddev) weights; `dims` are the dimensions' names and sizes, in order."""
    return nnx.Param(stddev * jax.random.normal(rngs.params(), tuple(dims.values())), axes=tuple(dims))


class Linear(nnx.Module):
    """y = x W + b over the last dimensions of x, `inputs`, to `outputs`: names and sizes, in order."""

    def __init__(self, rngs: nnx.Rngs, inputs: dict[str, int], outputs: dict[str, int], stddev: float):
        self.contract = len(inputs)
        self.kernel = normal_param(rngs, inputs | outputs, stddev)
        self.bias = nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.contract)
        bias = self.bias[...].astype(x.dtype)
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))


class LayerNorm(nnx.Module):
    """Layer normalisation, computed in float32. Source: Ba et al. 2016, arXiv:1607.06450, eq. 4."""

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size), axes=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)
        return (normed * self.scale[...][None, None] + self.bias[...][None, None]).astype(x_BTD.dtype)


class MLP(nnx.Module):
    """Two linear maps, exact GELU between. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.dropout = config.dropout
        width, hidden = {"embed": config.n_embd}, {"mlp": config.hidden_size}
        self.up = Linear(rngs, width, hidden, config.initializer_range)
        self.down = Linear(rngs, hidden, width, config.initializer_range / math.sqrt(2 * config.n_layers))

    def __call__(self, x_BTD: jax.Array, keys_B: jax.Array | None, order_T: np.ndarray) -> jax.Array:
        h_BTF = constrain(self.up(x_BTD), "batch", "length", "mlp")
        h_BTF = 0.5 * h_BTF * (1.0 + jax.lax.erf(h_BTF * math.sqrt(0.5)))  # cheaper than jax.nn.gelu's erfc
        return dropout(self.down(h_BTF), self.dropout, keys_B, order_T)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, order_T: np.ndarray, axis: int = 1) -> jax.Array:
    """Drops elements of x `[B, ...]` at `rate` and scales the rest by 1 / (1 - rate); without keys it drops nothing.

    `axis` of x is that of the positions, which lie in the order `order_T`. The mask depends on a row's own key and on
    the position alone, so it is the same in any microbatch, on any device and in any order.
    """
    if keys_B is None or rate == 0.0:
        return x
    keys_BT = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, order_T))(keys_B)
    shape = tuple(size for dim, size in enumerate(x.shape) if dim not in (0, axis))
    draw = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape), out_axes=axis - 1))
    return jnp.where(draw(keys_BT), x / (1.0 - rate), jnp.zeros_like(x))


def fold_in(keys_B: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """`jax.random.fold_in` for each key of `[B]`."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, data)
