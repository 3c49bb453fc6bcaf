"""Runs a stack of layers in stages on their own devices, with several microbatches under way.

With P stages and M microbatches a pass takes M + P - 1 ticks, of which every stage works in M: the
bubble is (P - 1) / (M + P - 1) of the time.

Source: Huang et al. 2019 (GPipe), arXiv:1811.06965, section 2.2.

Legend: B batch, T length, D model width, M microbatches, P stages.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.parallel.layout import split_rows
from l1_jax.parallel.sharding import constrain


def run_stages(
    stage: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    layers: Any,
    x_BTD: jax.Array,
    inputs: Any,
    input_dims: Any,
    num_stages: int,
    num_microbatches: int,
) -> tuple[jax.Array, Any]:
    """All layers on x: `stage` applied `num_stages` times, each time to its layers.

    In each tick all stages work, each on another microbatch (which is what the vmap says). Then
    each hands it on to the next (the roll, a message between neighbours).

    Args:
        stage: `stage(layers, x, inputs)` is x after these layers, and what they add up of its
            rows: a tree of `[B]` arrays.
        layers: a tree of arrays stacked over the layers, which the mesh axis `pipeline` divides.
        x_BTD: what enters the first layer.
        inputs: a tree of arrays that begin with the dimension B and go with their rows.
        input_dims: the names of their dimensions, in their places.
        num_stages: P.
        num_microbatches: M.

    Returns:
        `[B, T, D]`, what leaves the last layer; and the sums of all layers, with the rows in any
        order.
    """

    def divide(leaf: jax.Array) -> jax.Array:
        """`[L, ...]` -> `[P, L / P, ...]`."""
        return leaf.reshape(num_stages, -1, *leaf.shape[1:])

    layers = jax.tree.map(divide, layers)
    waiting_MBTD = split_rows(x_BTD, ("batch", "length", None), num_microbatches)
    inputs = split_rows(inputs, input_dims, num_microbatches)
    stages_P = jnp.arange(num_stages)

    def is_stage(number: int) -> jax.Array:
        """bool `[P, 1, 1, 1]`."""
        return (stages_P == number)[:, None, None, None]

    def tick(x_PBTD: jax.Array, inputs_of_tick: Any) -> tuple[jax.Array, Any]:
        entering_PBTD, time = inputs_of_tick

        # The microbatch that is in each stage. Stages with none, at the beginning and the end, work
        # on one all the same, and nobody takes what they make of it.
        microbatch_P = jnp.clip(time - stages_P, 0, num_microbatches - 1)

        # The first stage takes the next in line, the others what their neighbours have done.
        is_first = is_stage(0)
        handed_on_PBTD = jnp.roll(x_PBTD, 1, axis=0)
        x_PBTD = jnp.where(is_first, entering_PBTD, handed_on_PBTD)
        x_PBTD = constrain(x_PBTD, "layers", "batch", "length", None)

        inputs_P = jax.tree.map(lambda leaf: leaf[microbatch_P], inputs)
        all_stages = jax.vmap(stage, spmd_axis_name="pipeline")
        x_PBTD, sums_PB = all_stages(layers, x_PBTD, inputs_P)

        # Only what is made of a microbatch counts, and not what idle stages make.
        is_working_P = (time >= stages_P) & (time - stages_P < num_microbatches)
        sums_PB = jax.tree.map(lambda x: jnp.where(is_working_P[:, None], x, 0), sums_PB)
        return x_PBTD, (x_PBTD, sums_PB)

    empty_PBTD = jnp.zeros((num_stages, *waiting_MBTD.shape[1:]), x_BTD.dtype)

    # What enters the first stage is there before its tick, and 0 in the other stages, so that in a
    # tick no stage asks another. In the last P - 1 ticks nothing enters.
    entering_MPBTD = jnp.where(is_stage(0), waiting_MBTD[:, None], 0)
    entering_MPBTD = constrain(entering_MPBTD, None, "layers", "batch", "length", None)
    nothing = jnp.zeros((num_stages - 1, *entering_MPBTD.shape[1:]), x_BTD.dtype)
    entering = jnp.concatenate([entering_MPBTD, nothing])
    times = jnp.arange(len(entering))
    _, (left, sums) = jax.lax.scan(tick, empty_PBTD, (entering, times))

    # Of what each tick left in each stage: the last stage's, once the first microbatch is there.
    last = num_stages - 1
    done_MPBTD = jnp.where(is_stage(last), left[last:], 0)
    done_MBTD = done_MPBTD.sum(axis=1)
    y_BTD = done_MBTD.swapaxes(0, 1).reshape(x_BTD.shape)
    sums = jax.tree.map(lambda of_ticks: of_ticks.reshape(-1), sums)
    return constrain(y_BTD, "batch", "length", None), sums
