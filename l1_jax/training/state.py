"""What a run carries from step to step, and its first value."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

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


def state_shardings(
    create: Callable[[], TrainState], optimizer: optax.GradientTransformation, axes: dict[str, Any], mesh: Mesh
) -> TrainState:
    """Where each array of the state lies: the optimizer's as the parameter it belongs to, scalars everywhere."""
    abstract = jax.eval_shape(create)
    everywhere = named(mesh)
    params = parameter_shardings(mesh, axes)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, placed: placed, abstract.opt_state, params, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, params, opt_state, jax.tree.map(lambda _: everywhere, abstract.loss_scale))
