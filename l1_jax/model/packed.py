"""Packed weights: small integers, and the scales that make numbers of them again.

A weight is an array or a `Packed`, and whoever uses one need not know which: products read it with
`unpack`, a lookup with `take_rows`, the mesh has it from `constrain_weight`. Anything that works on
trees of arrays sees the arrays inside.

A packed weight is not trained: a product with it has a gradient of its other operand alone.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.errors import UserError
from l1_jax.parallel.sharding import constrain

MOST_INT8 = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight that is `values * scales`.

    Both have the dimensions of the weight, in its order, so that a part of the weight (a layer,
    some rows of a table) is that part of each. Where the scales have size 1 along a dimension, one
    scale holds for the whole of it.
    """

    values: Any  # int8: an array, or what stands for one
    scales: Any  # float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers the weight has, without the scales."""
        return math.prod(self.shape)


Weight = jax.Array | Packed

# How weights are packed, by their dotted paths with all layers stacked, as `blocks.mlp.up.kernel`.
Packing = Mapping[str, str]

NOTHING: Packing = {}


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of a tree of parameters is packed."""
    return isinstance(leaf, Packed)


def unpack(weight: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as an array of this type, packed or not."""
    if not isinstance(weight, Packed):
        return weight.astype(dtype)

    numbers = weight.values.astype(jnp.float32) * weight.scales
    return numbers.astype(dtype)


def take_rows(table: Weight, rows: jax.Array) -> jax.Array:
    """Rows of a table `[V, D]` by their numbers, float32 `[..., D]`; only those are unpacked."""
    picked = jax.tree.map(lambda array: array[rows], table)
    return unpack(picked, jnp.float32)


def constrain_weight(weight: Weight, *axes: str | None) -> Weight:
    """`constrain` for a weight."""
    if not isinstance(weight, Packed):
        return constrain(weight, *axes)

    def place(array: jax.Array) -> jax.Array:
        return constrain(array, *_names_of(array, axes))

    return jax.tree.map(place, weight)


def pack_int8(weight: jax.Array, summed: tuple[int, ...]) -> Packed:
    """A weight in int8, rounded to nearest, with a scale for each of its output channels.

    No number is further off than half a scale, which is the largest one of its channel / 127.

    Args:
        weight: float32.
        summed: the dimensions over which a product with it sums; the others tell channels apart.
    """
    largest = jnp.abs(weight).max(axis=summed, keepdims=True)
    scales = largest / MOST_INT8

    # A channel of zeros has a scale of 0.
    rounded = jnp.round(weight / jnp.where(scales > 0, scales, 1))
    values = jnp.clip(rounded, -MOST_INT8, MOST_INT8)
    return Packed(values.astype(jnp.int8), scales)


# By the type of what is stored as values.
PACKERS: dict[str, Callable[[jax.Array, tuple[int, ...]], Packed]] = {"int8": pack_int8}


def find_packing(shapes: Mapping[str, str]) -> dict[str, str]:
    """Which weights of a checkpoint are packed, and how.

    Args:
        shapes: type and shape of its arrays, `float32[2, 3]`, by their dotted names.

    Raises:
        UserError: in a way that is not known here.
    """
    parts = [field.name for field in dataclasses.fields(Packed)]
    split = [name.rpartition(".") for name in shapes]
    paths = sorted({path for path, _, part in split if part in parts})
    packing = {}

    for path in paths:
        kind = shapes.get(f"{path}.values", "missing").partition("[")[0]
        if kind not in PACKERS:
            what = f"the values of the packed weight {path} are {kind}"
            raise UserError(what, f"Use a checkpoint where they are {' or '.join(PACKERS)}")
        packing[path] = kind

    return packing


def pack_params(params: dict[str, Any], summed: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """Parameters with some of their weights packed.

    Args:
        params: arrays, all layers stacked.
        summed: of each the dimensions over which a product sums, see `transformer.summed_dims`.
        packing: which weights, and how.
    """

    def pack(path: tuple[Any, ...], array: jax.Array, dims: tuple[int, ...]) -> Weight:
        kind = packing.get(dotted(path))
        return array if kind is None else PACKERS[kind](array, dims)

    return jax.tree_util.tree_map_with_path(pack, params, summed)


def name_dims(axes: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The names of the dimensions of each array, those inside of packed weights too.

    Args:
        axes: names of the dimensions of each parameter.
        params: the shapes of all arrays.
    """

    def names_in(names: tuple[str, ...], weight: Any) -> Any:
        if not is_packed(weight):
            return names
        return jax.tree.map(lambda array: _names_of(array, names), weight)

    return jax.tree.map(names_in, axes, params, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _names_of(array: Any, names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The names of a weight's dimensions for one of its arrays: what has size 1 is not divided."""
    sizes = zip(names, array.shape, strict=True)
    return tuple(name if size > 1 else None for name, size in sizes)


def dotted(path: tuple[Any, ...]) -> str:
    """A path in a tree as text, `blocks.mlp.up.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
