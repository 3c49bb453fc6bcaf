"""What a run carries from step to step, and its first value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from optax import GradientTransformation

from l1_jax.parallel.sharding import named, parameter_shardings
from l1_jax.training.health import INITIAL_LOSS_SCALE, Health, LossScale

Initialiser = Callable[[jax.Array], dict[str, Any]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes."""

    step: jax.Array  # int32 scalar: batches consumed
    params: dict[str, Any]
    opt_state: Any
    loss_scale: LossScale | None  # with float16 only
    health: Health


def training_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of randomness: 0 initial weights, 1 dropout."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def create_state(initialise: Initialiser, optimizer: GradientTransformation, seed: int, float16: bool) -> TrainState:
    """The state of step 0."""
    params = initialise(training_key(seed, 0))
    scale = LossScale(jnp.float32(INITIAL_LOSS_SCALE), jnp.int32(0)) if float16 else None
    health = Health(jnp.float32(0), jnp.float32(0), jnp.int32(0), jnp.int32(0))
    return TrainState(jnp.int32(0), params, optimizer.init(params), scale, health)


def place_state(shapes: TrainState, axes: dict[str, Any], mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's shapes with shardings: the optimizer's arrays lie as the parameters that they belong to, dimension by
    dimension; those that it has averaged over, of size 1, are whole.

    `shapes` are `jax.eval_shape` of `create_state`; `axes`, from `transformer.build`, name the parameters' dimensions.
    """

    def place(leaf: jax.ShapeDtypeStruct, *names: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(mesh, *names))

    paths = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    names_of = dict(paths)

    def place_moment(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The path of an optimizer's array ends with that of its parameter; what has none is whole."""
        names = next((names_of[path[start:]] for start in range(len(path)) if path[start:] in names_of), None)
        sizes = zip(names, leaf.shape, strict=True) if names else ()
        return place(leaf, *(name if size > 1 else None for name, size in sizes))

    def everywhere(tree: Any) -> Any:
        return jax.tree.map(place, tree)

    params = jax.tree.map(lambda leaf, to: leaf.update(sharding=to), shapes.params, parameter_shardings(mesh, axes))
    moments = jax.tree_util.tree_map_with_path(place_moment, shapes.opt_state)
    scalars = {name: everywhere(getattr(shapes, name)) for name in ("step", "loss_scale", "health")}
    return TrainState(params=params, opt_state=moments, **scalars)
