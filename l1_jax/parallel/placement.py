"""Rows that a host holds -> global arrays on the mesh."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from l1_jax.parallel.layout import zigzag
from l1_jax.parallel.sharding import Dims, named


def process_rows(mesh: Mesh, global_batch_size: int) -> list[int]:
    """The rows of the global batch that this process's devices hold, ascending.

    Devices that differ only in `tensor` share rows.
    """
    sharding = named(mesh, "batch")
    indices = sharding.addressable_devices_indices_map((global_batch_size,))

    rows: set[int] = set()
    for index in indices.values():
        if index:
            rows.update(range(*index[0].indices(global_batch_size)))
    return sorted(rows)


def put_flag(value: bool, mesh: Mesh) -> jax.Array:
    """What each process says, as bool `[devices]`.

    `any` of it is the same in all processes, whatever they share of a batch.
    """

    def element(_: Any) -> np.ndarray:
        return np.array([value])

    return jax.make_array_from_callback((mesh.size,), named(mesh, "device"), element)


def put_batch(
    batch: Mapping[str, np.ndarray],
    dims: Mapping[str, Dims],
    *,
    rows: Sequence[int],
    mesh: Mesh,
    global_batch_size: int,
) -> dict[str, jax.Array]:
    """Places this process's rows of a batch as their part of the global arrays.

    Args:
        batch: fields by name, arrays that begin with `len(rows)`.
        dims: the names of each field's dimensions.
        rows: their numbers in the global batch, from `process_rows`.
        mesh: whose devices hold the arrays.
        global_batch_size: B, the rows of all processes.

    Returns:
        Arrays that begin with B. Where they have a dimension `length`, it is in the order of
        `zigzag`.
    """
    # Where in `batch` each row of the global batch is; 0 for those that are not of this process.
    local = np.zeros(global_batch_size, int)
    local[rows] = np.arange(len(rows))

    def put(values: np.ndarray, names: Dims) -> jax.Array:
        assert len(names) == values.ndim, f"{names} of an array {values.shape}"
        assert names[0] == "batch", f"{names} do not begin with the rows"

        for dim, name in enumerate(names):
            if name == "length":
                order = zigzag(values.shape[dim], mesh.shape["context"])
                values = np.take(values, order, axis=dim)

        def part(index: Any) -> np.ndarray:
            global_rows, *others = index
            return values[(local[global_rows], *others)]

        shape = (global_batch_size, *values.shape[1:])
        return jax.make_array_from_callback(shape, named(mesh, *names), part)

    return {name: put(values, dims[name]) for name, values in batch.items()}


def fetch_rows(values: jax.Array, mesh: Mesh) -> np.ndarray:
    """An array `[B, T]` that every device has whole, on the host and in the order of the text."""
    order = zigzag(values.shape[1], mesh.shape["context"])

    rows = np.empty(values.shape, values.dtype)
    rows[:, order] = values
    return rows
