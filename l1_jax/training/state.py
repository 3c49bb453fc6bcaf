"""What a run carries from step to step, and its first value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from l1_jax.parallel.sharding import named, parameter_shardings

INITIAL_LOSS_SCALE = 2.0**16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16. Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2."""

    scale: jax.Array  # float32 scalar
    good_steps: jax.Array  # int32 scalar: finite steps since the last change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes. `step` (int32 scalar) counts the batches consumed."""

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    loss_scale: LossScale | None


def training_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of randomness: 0 initial weights, 1 dropout."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def state_initialiser(
    initialise: Callable[[jax.Array], dict[str, Any]], optimizer: optax.GradientTransformation, seed: int, float16: bool
) -> Callable[[], TrainState]:
    """A pure function that makes the state of step 0."""

    def create() -> TrainState:
        params = initialise(training_key(seed, 0))
        scale = LossScale(jnp.float32(INITIAL_LOSS_SCALE), jnp.int32(0)) if float16 else None
        return TrainState(jnp.int32(0), params, optimizer.init(params), scale)

    return create


def abstract_state(
    create: Callable[[], TrainState], optimizer: optax.GradientTransformation, axes: dict[str, Any], mesh: Mesh
) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s with shardings: the optimizer's arrays lie as the parameters they belong to.

    Args:
        create: from `state_initialiser`.
        optimizer: what made the optimizer's state.
        axes: the names of the parameters' dimensions, from `transformer.build`.
        mesh: where the state is to lie.
    """

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def place_everywhere(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: place(leaf, named(mesh)), tree)

    shapes, shardings = jax.eval_shape(create), parameter_shardings(mesh, axes)
    opt_state = optax.tree_map_params(
        optimizer, place, shapes.opt_state, shardings, transform_non_params=place_everywhere
    )
    params = jax.tree.map(place, shapes.params, shardings)
    return TrainState(place_everywhere(shapes.step), params, opt_state, place_everywhere(shapes.loss_scale))
