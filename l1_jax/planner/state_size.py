"""The state of a run in bytes on a device, exact, and what else follows from its shapes."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import Resolved
from l1_jax.model.flops import Frozen, count_frozen, count_parameters
from l1_jax.model.packed import is_packed
from l1_jax.parallel.section import ParallelismConfig
from l1_jax.training.initial import expect_packing
from l1_jax.training.matrices import muon_flops
from l1_jax.training.program import make_program
from l1_jax.training.state import select


class StateSize(NamedTuple):
    """The state on a device in bytes, and what of the whole model follows from its shapes."""

    params: int  # bytes of the parameters
    unpacked: int  # bytes of the same in float32
    trained: int  # bytes of those that are trained
    state: int  # bytes of all, the parameters included
    num_parameters: int
    frozen: Frozen
    optimizer_flops: int  # of a step, where there are enough to count


@functools.cache
def _state(config: Resolved, mesh: Mesh | AbstractMesh) -> StateSize:
    program = make_program(config, mesh, packing=expect_packing(config))
    state = program.abstract
    optimizer_flops = 0
    if config.training.optimizer == "muon":
        axes = select(program.axes, state.params)
        optimizer_flops = muon_flops(state.params, axes)

    return StateSize(
        params=local_bytes(state.weights),
        unpacked=local_bytes(jax.tree.map(_in_float32, state.weights, is_leaf=is_packed)),
        trained=local_bytes(state.params),
        state=local_bytes(state),
        num_parameters=count_parameters(config.model, state.weights),
        frozen=count_frozen(config.model, state.params, state.held),
        optimizer_flops=optimizer_flops,
    )


def _in_float32(weight: Any) -> jax.ShapeDtypeStruct:
    """The shape of a weight that is not packed."""
    if not is_packed(weight):
        return weight

    return jax.ShapeDtypeStruct(weight.shape, jnp.float32, sharding=weight.values.sharding)


def state_bytes(config: Resolved, mesh: Mesh | AbstractMesh) -> StateSize:
    """The size of the state of the resolved `config` on a device of `mesh`."""
    # It depends neither on the batch nor on what is recomputed, so that many configs of a search
    # share one answer.
    config = config.replace(
        "training", batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False
    )
    axes = vars(ParallelismConfig()) | {"pipeline_microbatches": 1}
    return _state(config.replace("parallelism", **axes), mesh)


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes or arrays on one device; exact."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shard) * leaf.dtype.itemsize
    return total
