"""The parts of a block: linear maps, norms, rotary positions, the MLP.

Each parameter carries the names of its dimensions (`axes`), which `parallel.sharding.RULES` maps to
the mesh. Parameters are float32; each layer computes in the type of its input.

Legend: B batch, T length, N heads, H head size, D model width, F hidden width.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from l1_jax.model.dropout import dropout
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain

LINEAR = "linear"  # the name by which a remat policy keeps what linear maps give


def normal_param(rngs: nnx.Rngs, dims: dict[str, int], stddev: float) -> nnx.Param:
    """Normal(0, stddev) weights; `dims` are the dimensions' names and sizes, in order."""
    return nnx.Param(
        stddev * jax.random.normal(rngs.params(), tuple(dims.values())), axes=tuple(dims)
    )


class Linear(nnx.Module):
    """y = x W + b over the last dimensions of x, `inputs`, to `outputs`: names and sizes, in
    order."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: dict[str, int],
        outputs: dict[str, int],
        stddev: float,
        bias: bool,
    ):
        self.contract = len(inputs)
        self.kernel = normal_param(rngs, inputs | outputs, stddev)
        self.bias = (
            nnx.Param(jnp.zeros(tuple(outputs.values())), axes=tuple(outputs)) if bias else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = checkpoint_name(contract(self.contract, x, self.kernel[...]), LINEAR)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(x.dtype)
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))


def sum_in_float32(product: Callable[..., jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """`product(x, y)`, an einsum or a dot_general, whose sums and result are float32 whatever x and
    y are."""
    exact = functools.partial(product, preferred_element_type=jnp.float32)
    if x.dtype == y.dtype == jnp.float32:
        return exact(x, y)

    # XLA:CPU takes a half-precision product with a float32 result in some layouts alone, and may
    # turn one that it has taken into one that it has not (jaxlib 0.10.2). Nothing is lost by
    # float32 operands there: the product of two numbers of 8 or 11 bits is exact in it.
    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return exact(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x, y, cpu=widened, default=exact)


def einsum_float32(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.einsum` as a product of `sum_in_float32`."""
    return sum_in_float32(functools.partial(jnp.einsum, subscripts), x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(num_dims: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x times the kernel, summed over the last `num_dims` dimensions of x, the kernel's first; in
    x's type."""
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_dims)


def _contract(num_dims, x, kernel):
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=num_dims), (x, kernel)


def _contract_gradients(num_dims, kept, d_y):
    x, kernel = kept
    rows = x.ndim - num_dims
    outputs = tuple(range(rows, d_y.ndim)), tuple(range(num_dims, kernel.ndim))
    d_x = jax.lax.dot_general(d_y, kernel.astype(x.dtype), (outputs, ((), ())))
    straight = functools.partial(kernel_gradient, rows)
    wide = math.prod(kernel.shape[:num_dims]) > math.prod(kernel.shape[num_dims:])
    on_cpu = functools.partial(turned_kernel_gradient, rows) if wide else straight
    return d_x, jax.lax.platform_dependent(x, d_y, cpu=on_cpu, default=straight)


def kernel_gradient(rows, x, d_y):
    """Summed over the first `rows` dimensions. Not d_y first, as autodiff has it: XLA:CPU turns the
    first operand, and d_y while it is made."""
    sums = (tuple(range(rows)),) * 2
    product = functools.partial(jax.lax.dot_general, dimension_numbers=(sums, ((), ())))
    return sum_in_float32(product, x, d_y)


def turned_kernel_gradient(rows, x, d_y):
    """The same for an x wider than d_y: long rows are slow to turn. The barrier has XLA turn d_y
    all the same."""
    d_kernel = jax.lax.optimization_barrier(kernel_gradient(rows, d_y, x))
    num_dims = x.ndim - rows
    return jnp.moveaxis(d_kernel, tuple(range(-num_dims, 0)), tuple(range(num_dims)))


contract.defvjp(_contract, _contract_gradients)


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
        return (normed * self.scale[...][None, None] + self.bias[...][None, None]).astype(
            x_BTD.dtype
        )


class RMSNorm(nnx.Module):
    """Root mean square normalisation of the last dimension, called `axis`, computed in float32.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, size: int, epsilon: float, axis: str = "embed"):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normed * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))).astype(x.dtype)


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm of the model width that `model.norm` means."""
    return {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[config.norm](
        config.n_embd, config.layer_norm_epsilon
    )


def projection_stddev(config: ModelConfig) -> float:
    """Of the maps back into the residual stream: 1 / sqrt(2 L) of the others, or 0 (Goyal et al.
    2017, arXiv:1706.02677, section 5.1; Zhang et al. 2019, arXiv:1901.09321, section 3)."""
    return (
        0.0
        if config.zero_init_projections
        else config.initializer_range / math.sqrt(2 * config.n_layers)
    )


Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, float32 [B, T, 1, H/2] each; B may be 1


def rotation(positions_BT: jax.Array, size: int, theta: float) -> Rotation:
    """By how much each pair of a head of `size` dimensions is turned at each position: p
    theta^(-2i/H).

    Source: Su et al. 2021 (RoFormer), arXiv:2104.09864, section 3.2.2.
    """
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    angles = (
        positions_BT[:, :, None, None] * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, turn: Rotation) -> jax.Array:
    """Turns the pairs (i, i + H/2) of each head, as LLaMA does; computed in float32."""
    cos, sin = turn
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class MLP(nnx.Module):
    """Two linear maps and a nonlinearity between, or, with swiglu, three.

    Sources: exact GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; ReLU squared, So et
    al. 2021 (Primer), arXiv:2109.08668, section 4.2; SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.dropout, self.activation = config.dropout, config.activation
        width, hidden = {"embed": config.n_embd}, {"mlp": config.hidden_size}
        fused = {"gate": 2} | hidden if config.activation == "swiglu" else hidden
        self.up = Linear(rngs, width, fused, config.initializer_range, config.bias)
        self.down = Linear(rngs, hidden, width, projection_stddev(config), config.bias)

    def __call__(
        self, x_BTD: jax.Array, keys_B: jax.Array | None, order_T: np.ndarray
    ) -> jax.Array:
        h_BTF = self.up(x_BTD)
        if self.activation == "swiglu":
            gates = constrain(h_BTF, "batch", "length", None, "mlp")
            h_BTF = jax.nn.silu(gates[:, :, 0]) * gates[:, :, 1]
        elif self.activation == "relu_squared":
            h_BTF = jnp.square(jax.nn.relu(constrain(h_BTF, "batch", "length", "mlp")))
        else:
            h_BTF = gelu(constrain(h_BTF, "batch", "length", "mlp"))
        return dropout(self.down(h_BTF), self.dropout, keys_B, order_T)


@functools.partial(
    jax.checkpoint, prevent_cse=False
)  # else the terms of the slope are kept for the backward pass
def gelu(x: jax.Array) -> jax.Array:
    """By erf, which is cheaper than the erfc of `jax.nn.gelu`."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
