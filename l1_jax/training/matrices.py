"""Optimizers that take a parameter matrix by matrix: Muon and Adafactor.

Of Adafactor that is its factored second moment.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from l1_jax.parallel.sharding import constrain, num_parts

# Jordan et al. 2024, as in their Muon.
MUON_MOMENTUM = 0.95
MUON_ITERATIONS = 5

# Dimensions along which matrices of their own lie.
STACKED = ("layers", "qkv", "gate")

# The names of a parameter's dimensions, in order, and the numbers of some of them.
Names = tuple[str, ...]
Dims = tuple[int, ...]


class MatrixDims(NamedTuple):
    """Which dimensions of a parameter are the inputs and which the outputs of a linear map."""

    inputs: Dims
    outputs: Dims


NOT_A_MATRIX = MatrixDims((), ())


def matrix_dims(axes: Names) -> MatrixDims:
    """The inputs and outputs of a parameter whose dimensions are called `axes`.

    None of a vector's dimensions are. Those that are left, `STACKED`, number the maps.
    """
    own = _own_dims(axes)
    if "embed" not in axes or len(own) == 1:
        return NOT_A_MATRIX

    # The model width is one dimension; heads and their size, on the other side, are two.
    if axes[own[0]] == "embed":
        return MatrixDims(inputs=own[:1], outputs=own[1:])
    return MatrixDims(inputs=own[:-1], outputs=own[-1:])


def _own_dims(axes: Names) -> Dims:
    """The dimensions of one matrix or vector, without those along which several are stacked."""
    return tuple(dim for dim, name in enumerate(axes) if name not in STACKED)


def map_axes(function: Callable[[Names], Any], axes: Any) -> Any:
    """A tree of what `function` makes of each parameter's tuple of dimension names."""
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def is_matrix(axes: Names) -> bool:
    """Whether it is a matrix of the blocks; tables (embeddings, positions, the head) are not."""
    return axes[0] == "layers" and matrix_dims(axes) != NOT_A_MATRIX


def scale_by_orthogonal_momentum(moment: jnp.dtype, axes: Any) -> optax.GradientTransformation:
    """Muon: Nesterov momentum, made nearly orthogonal, times sqrt(max(1, outputs / inputs)).

    It is for the matrices of the blocks alone. Devices that share the parameters exchange their
    parts of matrices for whole ones, so that no iteration sends anything.

    Args:
        moment: the type in which the momentum is kept.
        axes: a tree of the names of the parameters' dimensions.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def matrix_or_masked(names: Names) -> Any:
        return names if is_matrix(names) else optax.MaskedNode()

    def dim_numbers(names: Names) -> Any:
        if not is_matrix(names):
            return optax.MaskedNode()
        inputs, outputs = matrix_dims(names)
        return contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    matrix_names = map_axes(matrix_or_masked, axes)

    # Without momentum Muon is the orthogonalisation alone, by Newton and Schulz's iteration.
    newton_schulz = contrib.scale_by_muon(
        ns_steps=MUON_ITERATIONS,
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=map_axes(dim_numbers, axes),
    )

    def scale_by_shape(update: jax.Array, names: Names) -> jax.Array:
        input_dims, output_dims = matrix_dims(names)
        inputs = _num_elements(update, input_dims)
        outputs = _num_elements(update, output_dims)
        return update * math.sqrt(max(1.0, outputs / inputs))

    def orthogonalise(momentum: Any, _: Any) -> Any:
        whole = jax.tree.map(_gather, momentum, matrix_names)
        updates, _ = newton_schulz.update(whole, newton_schulz.init(whole))
        updates = jax.tree.map(_scatter, momentum, updates, matrix_names)
        return jax.tree.map(scale_by_shape, updates, matrix_names)

    momentum = optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=moment)
    return optax.chain(momentum, optax.stateless(orthogonalise))


def _num_elements(x: jax.Array, dims: Dims) -> int:
    """The product of the sizes of some dimensions."""
    return math.prod(x.shape[dim] for dim in dims)


def _placements(names: Names) -> list[tuple[str | None, ...]]:
    """From parts of each matrix to whole ones: names of dimensions for `constrain`.

    In steps, for XLA exchanges over one axis of the mesh at a time.
    """
    other_names = names[1:]
    width_is_whole = tuple(None if name == "embed" else name for name in other_names)
    all_are_whole = (None,) * len(other_names)
    return [names, ("matrices_by_width", *width_is_whole), ("matrices", *all_are_whole)]


def _gather(parts: jax.Array, names: Names) -> jax.Array:
    """From parts of all matrices to as many whole ones on each device.

    In each stage of a pipeline the matrices beyond its layers are zeros.

    Args:
        parts: stacked over the layers.
        names: of its dimensions.
    """
    # So many zeros that each device of a stage has equally many matrices.
    stages = num_parts("layers")
    devices_per_stage = num_parts("matrices") // stages
    layers_per_stage = len(parts) // stages
    missing = -layers_per_stage % devices_per_stage

    # Each stage's own come first, and its zeros after them, so that none has to leave the stage.
    by_stage = parts.reshape(stages, -1, *parts.shape[1:])
    widths = [(0, 0)] * by_stage.ndim
    widths[1] = (0, missing)
    whole = jnp.pad(by_stage, widths).reshape(-1, *parts.shape[1:])

    for placement in _placements(names):
        whole = constrain(whole, *placement)
    return whole


def _scatter(parts: jax.Array, whole: jax.Array, names: Names) -> jax.Array:
    """Back again: `whole` as `parts` was before `_gather`."""
    for placement in reversed(_placements(names)):
        whole = constrain(whole, *placement)

    stages = num_parts("layers")
    layers_per_stage = len(parts) // stages
    by_stage = whole.reshape(stages, -1, *parts.shape[1:])
    return by_stage[:, :layers_per_stage].reshape(parts.shape)


def muon_flops(params: Any, axes: Any) -> int:
    """Floating-point operations of a step's orthogonalisations.

    In each iteration X X', its square, and their sum times X.
    """

    def flops_of(leaf: Any, names: Names) -> int:
        if not is_matrix(names):
            return 0
        sides = [_num_elements(leaf, dims) for dims in matrix_dims(names)]
        small = min(sides)
        large = max(sides)
        num_matrices = leaf.size // (small * large)

        # Two operations for each number that is multiplied and added.
        products_with_x = 2 * (2 * small**2 * large)
        square = 2 * small**3
        return num_matrices * MUON_ITERATIONS * (products_with_x + square)

    return sum(jax.tree.leaves(jax.tree.map(flops_of, params, axes)))


class FactoredState(NamedTuple):
    """Running means of squared gradients, over a matrix's outputs and over its inputs.

    What was averaged over has size 1. Of a vector both are the whole.
    """

    steps: jax.Array  # int32 scalar
    rows: Any  # means over the outputs
    columns: Any  # means over the inputs


def scale_by_factored_moment(axes: Any) -> optax.GradientTransformation:
    """Adafactor without first moment and relative step.

    Each matrix is taken by itself, also of several in an array. (optax factors an array's two
    largest dimensions, here often heads of one matrix.)

    Args:
        axes: a tree of the names of the parameters' dimensions.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, section 7.2 (decay
    1 - t^-0.8); update clipping at 1, section 6.
    """

    def init(params: Any) -> FactoredState:
        def row(param: jax.Array, names: Names) -> jax.Array:
            return _zero_means(param, matrix_dims(names).outputs)

        def column(param: jax.Array, names: Names) -> jax.Array:
            return _zero_means(param, matrix_dims(names).inputs)

        return FactoredState(
            steps=jnp.int32(0),
            rows=jax.tree.map(row, params, axes),
            columns=jax.tree.map(column, params, axes),
        )

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        # 0 at the first step: its means are those of its own gradient.
        decay = 1 - (state.steps + 1.0) ** -0.8

        def new_mean(old: jax.Array, grad: jax.Array, averaged: Dims) -> jax.Array:
            # The smallest square keeps a gradient of zeros from a division by 0.
            squares = jnp.square(grad) + 1e-30
            return decay * old + (1 - decay) * squares.mean(averaged, keepdims=True)

        def row(grad: jax.Array, names: Names, old: jax.Array) -> jax.Array:
            return new_mean(old, grad, matrix_dims(names).outputs)

        def column(grad: jax.Array, names: Names, old: jax.Array) -> jax.Array:
            return new_mean(old, grad, matrix_dims(names).inputs)

        rows = jax.tree.map(row, grads, axes, state.rows)
        columns = jax.tree.map(column, grads, axes, state.columns)
        updates = jax.tree.map(_scale_by_means, grads, axes, rows, columns)
        return updates, FactoredState(state.steps + 1, rows, columns)

    return optax.GradientTransformation(init, update)


def _zero_means(param: jax.Array, averaged: Dims) -> jax.Array:
    """Means of zeros over the dimensions `averaged`, which keep size 1."""
    shape = [1 if dim in averaged else size for dim, size in enumerate(param.shape)]
    return jnp.zeros(shape, jnp.float32)


def _scale_by_means(grad: jax.Array, names: Names, row: jax.Array, column: jax.Array) -> jax.Array:
    """The gradient over the root of its factored second moment, clipped by matrix."""
    relative_row = row / row.mean(matrix_dims(names).inputs, keepdims=True)
    scaled = grad * jax.lax.rsqrt(relative_row) * jax.lax.rsqrt(column)

    mean_square = jnp.square(scaled).mean(_own_dims(names), keepdims=True)
    root = jnp.sqrt(mean_square)
    return scaled / jnp.maximum(root, 1.0)
