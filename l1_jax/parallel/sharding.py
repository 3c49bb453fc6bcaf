"""What is placed where: one table from the names of array dimensions to mesh axes.

The model names its dimensions and never a mesh axis. To shard something in another way, change `RULES`.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l1_jax.config import ModelConfig
from l1_jax.errors import UserError

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # activations: rows of the batch
    "embed": "fsdp",  # parameters: the model width (activations keep theirs whole)
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head": None,
    "layers": None,
    "position": None,
    "qkv": None,
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are called `axes` (None: not sharded)."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The placement on `mesh` of an array whose dimensions are called `axes`."""
    return NamedSharding(mesh, spec(axes))


def parameter_shardings(mesh: Mesh, axes: Any) -> Any:
    """Placements for a tree whose leaves are tuples of dimension names."""
    return jax.tree.map(lambda names: named(mesh, *names), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the placement of an intermediate value; does nothing where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the batch is divided."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divisible(model: ModelConfig, mesh: Mesh) -> None:
    """Raises UserError where a dimension of the model does not divide over its mesh axis."""
    sizes = [(model.n_embd, "n_embd", "fsdp"), (model.n_heads, "n_heads", "tensor")]
    sizes += [(model.hidden_size, "n_inner", "tensor"), (model.padded_vocab_size, "vocab_size, padded to", "tensor")]
    for size, key, axis in sizes:
        if size % mesh.shape[axis]:
            near = max(n for n in range(1, mesh.shape[axis]) if size % n == 0)
            what = f"model.{key} {size} is not divisible by parallelism.{axis} {mesh.shape[axis]}"
            remedy = f"Set parallelism.{axis} to {near}, or model.{key} to a multiple of {mesh.shape[axis]}"
            raise UserError(what, remedy)


def process_rows(mesh: Mesh, global_batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, ascending. Peers in `tensor` share rows."""
    placed = named(mesh, "batch").addressable_devices_indices_map((global_batch_size,))
    slices = [index[0] for index in placed.values() if index]
    return sorted({row for part in slices for row in range(*part.indices(global_batch_size))})


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, global_batch_size: int) -> dict[str, jax.Array]:
    """Places this process's rows of a batch as their part of the global arrays `[B, ...]`."""

    def put(rows: np.ndarray) -> jax.Array:
        shape = (global_batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(named(mesh, "batch", *(None,) * (rows.ndim - 1)), rows, shape)

    return jax.tree.map(put, batch)
