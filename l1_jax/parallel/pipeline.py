"""Runs a stack of layers in stages, each on its own devices, with several microbatches under way.

Source: Huang et al. 2019 (GPipe), arXiv:1811.06965, section 2.2. With P stages and M microbatches a pass takes
M + P - 1 ticks, of which every stage works in M: the bubble is (P - 1) / (M + P - 1) of the time.

Legend: B batch, T length, D model width, M microbatches, P stages.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.parallel.layout import split_rows
from l1_jax.parallel.sharding import constrain


def run_stages(
    stage: Callable[[Any, jax.Array, Any], jax.Array],
    layers: Any,
    x_BTD: jax.Array,
    inputs: Any,
    num_stages: int,
    num_microbatches: int,
) -> jax.Array:
    """All layers on x, `[B, T, D]`: `stage(layers, x, inputs)` applied `num_stages` times, each time to its layers.

    The leaves of `layers` are stacked over the layers, which the mesh axis `pipeline` divides; those of `inputs` begin
    with the dimension B and go with their rows. In each tick all stages work, each on another microbatch (which is
    what the vmap says), and then hand it on to the next (the roll, a message between neighbours).
    """
    layers = jax.tree.map(lambda leaf: leaf.reshape(num_stages, -1, *leaf.shape[1:]), layers)
    waiting_MBTD, inputs = split_rows((x_BTD, inputs), num_microbatches)
    stages = jnp.arange(num_stages)

    def at_stage(number: int, x: jax.Array) -> jax.Array:
        """`[M, B, T, D]` -> `[M, P, B, T, D]`, 0 in the other stages: so that in a tick no stage asks another."""
        x = jnp.where((stages == number)[:, None, None, None], x[:, None], 0)
        return constrain(x, None, "layers", "batch", "length", None)

    def tick(x_PBTD: jax.Array, inputs_of_tick: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        entering_PBTD, time = inputs_of_tick
        number = jnp.clip(time - stages, 0, num_microbatches - 1)  # of the microbatch in each stage; others are idle
        x_PBTD = jnp.where((stages == 0)[:, None, None, None], entering_PBTD, jnp.roll(x_PBTD, 1, axis=0))
        x_PBTD = constrain(x_PBTD, "layers", "batch", "length", None)
        theirs = jax.tree.map(lambda leaf: leaf[number], inputs)
        x_PBTD = jax.vmap(stage, spmd_axis_name="pipeline")(layers, x_PBTD, theirs)
        return x_PBTD, x_PBTD

    empty_PBTD = jnp.zeros((num_stages, *waiting_MBTD.shape[1:]), x_BTD.dtype)
    entering = at_stage(0, waiting_MBTD)
    entering = jnp.concatenate([entering, jnp.zeros_like(entering[: num_stages - 1])])
    _, done = jax.lax.scan(tick, empty_PBTD, (entering, jnp.arange(len(entering))))
    done_MBTD = jnp.where((stages == num_stages - 1)[:, None, None, None], done[num_stages - 1 :], 0).sum(axis=1)
    return constrain(done_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", "length", None)
