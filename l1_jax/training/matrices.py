"""Optimizers that take a parameter matrix by matrix: Muon, and Adafactor's factored second moment."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from l1_jax.parallel.sharding import constrain, num_parts

MUON_MOMENTUM, MUON_ITERATIONS = 0.95, 5  # Jordan et al. 2024, as in their Muon
STACKED = ("layers", "qkv", "gate")  # dimensions along which matrices of their own lie
Dims = tuple[int, ...]


def matrix_dims(axes: tuple[str, ...]) -> tuple[Dims, Dims]:
    """Which dimensions of a parameter, by their names, are the inputs and which the outputs of a linear map; none of a
    vector's are. The others, `STACKED`, number the maps."""
    own = tuple(dim for dim, name in enumerate(axes) if name not in STACKED)
    if "embed" not in axes or len(own) == 1:
        return (), ()
    return (own[:1], own[1:]) if axes[own[0]] == "embed" else (own[:-1], own[-1:])


def map_axes(function: Any, axes: Any) -> Any:
    """A tree of what `function` makes of each parameter's tuple of dimension names."""
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def is_matrix(axes: tuple[str, ...]) -> bool:
    """The matrices of the blocks are, tables (embeddings, positions, the head) are not."""
    return axes[0] == "layers" and matrix_dims(axes) != ((), ())


def scale_by_orthogonal_momentum(moment: jnp.dtype, axes: Any) -> optax.GradientTransformation:
    """Muon: Nesterov momentum, kept in the type `moment`, made nearly orthogonal and multiplied by
    sqrt(max(1, outputs / inputs)). For the matrices of the blocks alone.

    Devices that share the parameters exchange their parts of matrices for whole ones, so that no iteration sends
    anything. Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """

    def of_matrices(function: Any) -> Any:
        return map_axes(lambda names: function(names) if is_matrix(names) else optax.MaskedNode(), axes)

    names, dims = of_matrices(lambda names: names), of_matrices(lambda n: contrib.MuonDimensionNumbers(*matrix_dims(n)))
    # Without momentum it is the orthogonalisation alone.
    newton_schulz = contrib.scale_by_muon(
        ns_steps=MUON_ITERATIONS, beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )

    def shaped(update: jax.Array, names: tuple[str, ...]) -> jax.Array:
        inputs, outputs = (math.prod(update.shape[dim] for dim in side) for side in matrix_dims(names))
        return update * math.sqrt(max(1.0, outputs / inputs))

    def orthogonal(momentum: Any, _: Any) -> Any:
        whole = jax.tree.map(_gather, momentum, names)
        updates = newton_schulz.update(whole, newton_schulz.init(whole))[0]
        return jax.tree.map(shaped, jax.tree.map(_scatter, momentum, updates, names), names)

    return optax.chain(optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=moment), optax.stateless(orthogonal))


def _places(names: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    """From parts of each matrix to whole ones; XLA exchanges over one axis of the mesh at a time."""
    by_width = tuple(None if name == "embed" else name for name in names[1:])
    return [names, ("matrices_by_width", *by_width), ("matrices", *(None for _ in by_width))]


def _gather(parts: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """As many whole matrices on each device; those beyond the layers, in each stage of a pipeline, are zeros."""
    stages = num_parts("layers")
    more = -(len(parts) // stages) % (num_parts("matrices") // stages)
    by_stage = parts.reshape(stages, -1, *parts.shape[1:])
    padded = jnp.pad(by_stage, [(0, 0), (0, more)] + [(0, 0)] * (parts.ndim - 1)).reshape(-1, *parts.shape[1:])
    return functools.reduce(lambda x, place: constrain(x, *place), _places(names), padded)


def _scatter(parts: jax.Array, whole: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Back again: as `parts` was before `_gather`."""
    stages = num_parts("layers")
    padded = functools.reduce(lambda x, place: constrain(x, *place), reversed(_places(names)), whole)
    by_stage = padded.reshape(stages, -1, *parts.shape[1:])
    return by_stage[:, : len(parts) // stages].reshape(parts.shape)


def muon_flops(params: Any, axes: Any) -> int:
    """Of a step's orthogonalisations: X X', its square, and their sum times X, in each iteration."""

    def one(leaf: Any, names: tuple[str, ...]) -> int:
        if not is_matrix(names):
            return 0
        small, large = sorted(math.prod(leaf.shape[dim] for dim in dims) for dims in matrix_dims(names))
        return leaf.size // (small * large) * MUON_ITERATIONS * (4 * small**2 * large + 2 * small**3)

    return sum(jax.tree.leaves(jax.tree.map(one, params, axes)))


class FactoredState(NamedTuple):
    """Running means of squared gradients over the outputs of a matrix and over its inputs; what was averaged over has
    size 1. Of a vector both are the whole."""

    steps: jax.Array  # int32 scalar
    rows: Any
    columns: Any


def scale_by_factored_moment(axes: Any) -> optax.GradientTransformation:
    """Adafactor without first moment and relative step; each matrix by itself, also of several in an array.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, section 7.2 (decay 1 - t^-0.8); update clipping
    at 1, section 6. (optax factors an array's two largest dimensions, here often heads of one matrix.)
    """

    def init(params: Any) -> FactoredState:
        def zeros(which: int) -> Any:
            def one(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
                dims = matrix_dims(names)[which]
                return jnp.zeros([1 if dim in dims else size for dim, size in enumerate(param.shape)], jnp.float32)

            return jax.tree.map(one, params, axes)

        return FactoredState(jnp.int32(0), zeros(1), zeros(0))

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        decay = 1 - (state.steps + 1.0) ** -0.8

        def mean(which: int, old: Any) -> Any:
            def one(grad: jax.Array, names: tuple[str, ...], old: jax.Array) -> jax.Array:
                squares = jnp.square(grad) + 1e-30
                return decay * old + (1 - decay) * squares.mean(matrix_dims(names)[which], keepdims=True)

            return jax.tree.map(one, grads, axes, old)

        def scaled(grad: jax.Array, names: tuple[str, ...], row: jax.Array, column: jax.Array) -> jax.Array:
            inputs, _ = matrix_dims(names)
            scaled = grad * jax.lax.rsqrt(row / row.mean(inputs, keepdims=True)) * jax.lax.rsqrt(column)
            own = tuple(dim for dim, name in enumerate(names) if name not in STACKED)
            rms = jnp.sqrt(jnp.square(scaled).mean(own, keepdims=True))
            return scaled / jnp.maximum(rms, 1.0)

        rows, columns = mean(1, state.rows), mean(0, state.columns)
        return jax.tree.map(scaled, grads, axes, rows, columns), FactoredState(state.steps + 1, rows, columns)

    return optax.GradientTransformation(init, update)
