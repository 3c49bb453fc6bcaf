"""Whether a state is finite: found on the devices, asked for when the answer is needed."""

from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.errors import RunError
from l1_jax.training.state import TrainState


class NotFiniteError(RunError):
    """A parameter or moment is NaN or infinite."""


def _is_finite(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Whether all of an array is: its products with zero are zeros, and else NaN. On CPU a matrix product takes a third
    of the time of `isfinite` and a reduction (benchmarks/RESULTS.md). XLA must not know `zero`."""
    if x.ndim == 0 or jax.default_backend() != "cpu":
        return jnp.isfinite(x).all()
    zeros = jnp.broadcast_to(zero, x.shape[-1:])
    return jnp.isfinite(jnp.dot(x, zeros, precision="highest")).all()


@jax.jit
def _are_finite(tree: Any, zero: jax.Array) -> Any:
    return jax.tree.map(lambda x: _is_finite(x, zero), tree)


def find_finite(state: TrainState) -> Any:
    """For each parameter and moment, by path, whether it is finite: bool scalars on the devices, which no one has
    waited for. Every process has to call this."""
    return _are_finite({"params": state.params, "opt_state": state.opt_state}, 0.0)


def require_finite(found: Any, step: int) -> None:
    """Raises NotFiniteError, naming the array, where `found`, of `find_finite`, has one that is not."""
    for path, finite in jax.tree_util.tree_leaves_with_path(jax.device_get(found)):
        if not finite:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            what = f"{name} holds numbers that are not finite at step {step}; nothing of this step was saved"
            remedy = (
                "Resume from the newest checkpoint; if it comes again, lower the learning rate or suspect the device"
            )
            raise NotFiniteError(what, remedy)
