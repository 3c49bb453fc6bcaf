"""The average of the weights over the steps of a run: `training.ema_decay`.

Source: Polyak and Juditsky 1992, of averaging; Tarvainen and Valpola 2017, arXiv:1703.01780, of
    the exponential average.
"""

from typing import Any

import jax
import jax.numpy as jnp

# The name of the tree beside the state, and of its item in a checkpoint.
AVERAGE = "average"

Tree = dict[str, Any]


def begin_average(params: Tree) -> dict[str, Tree]:
    """What lies beside a state whose average begins: the trained weights, in arrays of its own."""
    return {AVERAGE: jax.tree.map(jnp.copy, params)}


def update_average(beside: dict[str, Tree], params: Tree, decay: float | None) -> dict[str, Tree]:
    """What lies beside the state after a step.

    Args:
        beside: before the step.
        params: the trained weights after it.
        decay: how much of the average stays; None keeps none.

    Returns:
        The same, with average = decay x average + (1 - decay) x params.
    """
    if decay is None:
        return beside

    def move(average: jax.Array, param: jax.Array) -> jax.Array:
        return average + (1 - decay) * (param - average)

    return beside | {AVERAGE: jax.tree.map(move, beside[AVERAGE], params)}
