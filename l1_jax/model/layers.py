"""The parts of a block: linear maps, norms, rotary positions, the MLP.

Each parameter carries the names of its dimensions (`axes`), which `parallel.sharding.RULES` maps to
the mesh. Parameters are float32; each layer computes in the type of its input.

Legend: B batch, T length, N heads, H head size, D model width, F hidden width.
"""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from l1_jax.model.context import OF_MLP, Context, Rotation, Sums
from l1_jax.model.dropout import dropout
from l1_jax.model.packed import Weight, is_packed, unpack
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain

# The name by which a remat policy keeps what linear maps give.
LINEAR = "linear"


def normal_param(
    rngs: nnx.Rngs, dims: dict[str, int], stddev: float, summed: Iterable[str] = ()
) -> nnx.Param:
    """Weights drawn from Normal(0, stddev).

    Args:
        rngs: where the key of the draw comes from.
        dims: names and sizes of the dimensions, in order.
        stddev: of the distribution.
        summed: names of the dimensions over which a product with them sums; such weights may be
            packed.
    """
    weights = stddev * jax.random.normal(rngs.params(), tuple(dims.values()))
    return nnx.Param(weights, axes=tuple(dims), summed=tuple(summed))


class Linear(nnx.Module):
    """y = x W + b over the last dimensions of x.

    Args:
        rngs: where the key of the initial weights comes from.
        inputs: names and sizes of the dimensions that are summed over, in order.
        outputs: names and sizes of those that come in their place.
        stddev: of the initial weights.
        bias: whether there is a b; it starts at 0.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        inputs: dict[str, int],
        outputs: dict[str, int],
        stddev: float,
        bias: bool,
    ):
        self.num_input_dims = len(inputs)
        self.kernel = normal_param(rngs, inputs | outputs, stddev, summed=inputs)

        sizes = tuple(outputs.values())
        self.bias = nnx.Param(jnp.zeros(sizes), axes=tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = contract(self.num_input_dims, x, self.kernel.get_value())
        y = checkpoint_name(y, LINEAR)
        if self.bias is None:
            return y

        bias = self.bias[...].astype(x.dtype)
        other_dims = tuple(range(y.ndim - bias.ndim))
        return y + jnp.expand_dims(bias, other_dims)


def sum_in_float32(product: Callable[..., jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    """`product(x, y)`, an einsum or a dot_general, with float32 sums and a float32 result.

    The types of x and y do not matter.
    """
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
    """`jnp.einsum` of two arrays, with sums and result in float32; see `sum_in_float32`."""
    product = functools.partial(jnp.einsum, subscripts)
    return sum_in_float32(product, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(num_dims: int, x: jax.Array, kernel: Weight) -> jax.Array:
    """x times the kernel, in the type of x.

    Args:
        num_dims: how many dimensions are summed over: the last of x, the first of the kernel.
        x: any number of dimensions of rows, then those that are summed over.
        kernel: the dimensions that are summed over, then the outputs. One that is packed has no
            gradient.
    """
    return jnp.tensordot(x, unpack(kernel, x.dtype), axes=num_dims)


def _contract_forward(num_dims, x, kernel):
    """`contract`, and what its gradient needs: of a packed kernel that, and not the numbers."""
    y = jnp.tensordot(x, unpack(kernel, x.dtype), axes=num_dims)
    return y, (x, kernel)


def _contract_backward(num_dims, residuals, d_y):
    """The gradients of x and of the kernel."""
    x, kernel = residuals
    num_row_dims = x.ndim - num_dims

    # Of x: summed over the outputs.
    y_outputs = tuple(range(num_row_dims, d_y.ndim))
    kernel_outputs = tuple(range(num_dims, kernel.ndim))
    dimension_numbers = ((y_outputs, kernel_outputs), ((), ()))
    d_x = jax.lax.dot_general(d_y, unpack(kernel, x.dtype), dimension_numbers)
    if is_packed(kernel):
        return d_x, None

    # Of the kernel: summed over the rows. XLA:CPU turns the first operand of this product, so there
    # the narrower array comes first.
    straight = functools.partial(kernel_gradient, num_row_dims)
    turned = functools.partial(turned_kernel_gradient, num_row_dims)
    num_inputs = math.prod(kernel.shape[:num_dims])
    num_outputs = math.prod(kernel.shape[num_dims:])
    on_cpu = turned if num_inputs > num_outputs else straight
    d_kernel = jax.lax.platform_dependent(x, d_y, cpu=on_cpu, default=straight)
    return d_x, d_kernel


def kernel_gradient(num_row_dims, x, d_y):
    """The gradient of the kernel, float32, summed over the first `num_row_dims` dimensions.

    Its first operand is not d_y, as autodiff has it: XLA:CPU turns the first operand, and d_y while
    it is made.
    """
    row_dims = tuple(range(num_row_dims))
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=((row_dims, row_dims), ((), ()))
    )
    return sum_in_float32(product, x, d_y)


def turned_kernel_gradient(num_row_dims, x, d_y):
    """`kernel_gradient` for an x that is wider than d_y: long rows are slow to turn."""
    d_kernel = kernel_gradient(num_row_dims, d_y, x)

    # The barrier has XLA turn d_y all the same.
    d_kernel = jax.lax.optimization_barrier(d_kernel)

    num_input_dims = x.ndim - num_row_dims
    last_dims = tuple(range(-num_input_dims, 0))
    first_dims = tuple(range(num_input_dims))
    return jnp.moveaxis(d_kernel, last_dims, first_dims)


contract.defvjp(_contract_forward, _contract_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation, computed in float32.

    Source: Ba et al. 2016, arXiv:1607.06450, eq. 4.
    """

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(size), axes=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        wide_BTD = x_BTD.astype(jnp.float32)
        centred_BTD = wide_BTD - wide_BTD.mean(axis=-1, keepdims=True)
        variance_BT1 = jnp.square(centred_BTD).mean(axis=-1, keepdims=True)
        normed_BTD = centred_BTD * jax.lax.rsqrt(variance_BT1 + self.epsilon)

        y_BTD = normed_BTD * self.scale[...][None, None]
        y_BTD = y_BTD + self.bias[...][None, None]
        return y_BTD.astype(x_BTD.dtype)


class RMSNorm(nnx.Module):
    """Root mean square normalisation of the last dimension, called `axis`, computed in float32.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, size: int, epsilon: float, axis: str = "embed"):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(size), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        mean_square = jnp.square(wide).mean(axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)

        other_dims = tuple(range(x.ndim - 1))
        y = normed * jnp.expand_dims(self.scale[...], other_dims)
        return y.astype(x.dtype)


def make_norm(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The norm of the model width that `model.norm` means."""
    if config.norm == "layernorm":
        return LayerNorm(config.n_embd, config.layer_norm_epsilon)
    return RMSNorm(config.n_embd, config.layer_norm_epsilon)


def projection_stddev(config: ModelConfig) -> float:
    """The initial deviation of the maps back into the residual stream.

    It is 1 / sqrt(2 L) of that of the others, or 0.

    Sources: Goyal et al. 2017, arXiv:1706.02677, section 5.1; Zhang et al. 2019, arXiv:1901.09321,
    section 3.
    """
    if config.zero_init_projections:
        return 0.0
    return config.initializer_range / math.sqrt(2 * config.n_layers)


def make_rotation(positions_BT: jax.Array, size: int, theta: float) -> Rotation:
    """By how much each pair of a head is turned at each position: p theta^(-2i/H).

    Args:
        positions_BT: int32; B may be 1.
        size: of a head.
        theta: the slowest pair's wavelength is 2 pi times nearly this many positions.

    Source: Su et al. 2021 (RoFormer), arXiv:2104.09864, section 3.2.2.
    """
    frequencies = theta ** (-np.arange(0, size, 2) / size)
    positions_BT11 = positions_BT[:, :, None, None]
    angles = positions_BT11 * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs (i, i + H/2) of each head, as LLaMA does; computed in float32."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    return jnp.concatenate([turned_first, turned_second], axis=-1).astype(x_BTNH.dtype)


class MLP(nnx.Module):
    """Two linear maps and a nonlinearity between, or, with swiglu, three.

    Sources: exact GELU, Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; ReLU squared, So et
    al. 2021 (Primer), arXiv:2109.08668, section 4.2; SwiGLU, Shazeer 2020, arXiv:2002.05202, eq. 6.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.dropout = config.dropout
        self.activation = config.activation

        width = {"embed": config.n_embd}
        hidden = {"mlp": config.hidden_size}
        # The gate and what it gates are one product.
        up_outputs = {"gate": 2} | hidden if config.activation == "swiglu" else hidden

        self.up = Linear(rngs, width, up_outputs, stddev=config.initializer_range, bias=config.bias)
        self.down = Linear(rngs, hidden, width, stddev=projection_stddev(config), bias=config.bias)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        """The MLP of each position, in the type of x; it adds nothing to an objective."""
        order_T = context.order(x_BTD.shape[1])
        keys_B = context.keys(OF_MLP)
        h_BTF = self.up(x_BTD)

        if self.activation == "swiglu":
            gates_BT2F = constrain(h_BTF, "batch", "length", None, "mlp")
            h_BTF = jax.nn.silu(gates_BT2F[:, :, 0]) * gates_BT2F[:, :, 1]
        elif self.activation == "relu_squared":
            h_BTF = constrain(h_BTF, "batch", "length", "mlp")
            h_BTF = jnp.square(jax.nn.relu(h_BTF))
        else:
            h_BTF = constrain(h_BTF, "batch", "length", "mlp")
            h_BTF = gelu(h_BTF)

        return dropout(self.down(h_BTF), self.dropout, keys_B, order_T), {}


# Computed again in the backward pass, for else the terms of the slope are kept for it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def gelu(x: jax.Array) -> jax.Array:
    """By erf, which is cheaper than the erfc of `jax.nn.gelu`."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))
