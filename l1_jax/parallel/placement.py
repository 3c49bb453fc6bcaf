"""Rows that a host holds -> global arrays on the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l1_jax.parallel.layout import zigzag
from l1_jax.parallel.section import MESH_AXES
from l1_jax.parallel.sharding import named


def process_rows(mesh: Mesh, global_batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, ascending. Peers in `tensor` share rows."""
    placed = named(mesh, "batch").addressable_devices_indices_map((global_batch_size,))
    slices = [index[0] for index in placed.values() if index]
    return sorted({row for part in slices for row in range(*part.indices(global_batch_size))})


def per_device(mesh: Mesh) -> NamedSharding:
    """The placement of an array with one element for each device: each process says its own."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES))


def put_flag(value: bool, mesh: Mesh) -> jax.Array:
    """What each process says, as bool `[devices]`: `any` of it is the same in all, whatever they share of a batch."""
    return jax.make_array_from_callback((mesh.size,), per_device(mesh), lambda _: np.array([value]))


def put_batch(
    batch: dict[str, np.ndarray], rows: list[int], mesh: Mesh, global_batch_size: int
) -> dict[str, jax.Array]:
    """Places this process's `rows` of a batch as their part of the global arrays `[B]` and, zigzag, `[B, T]`."""
    local = np.zeros(global_batch_size, int)
    local[rows] = np.arange(len(rows))

    def put(values: np.ndarray) -> jax.Array:
        if values.ndim == 2:
            values = values[:, zigzag(values.shape[1], mesh.shape["context"])]
        sharding = named(mesh, *("batch", "length")[: values.ndim])
        shape = (global_batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda at: values[(local[at[0]], *at[1:])])  # type: ignore

    return jax.tree.map(put, batch)
