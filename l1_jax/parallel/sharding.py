"""What is placed where: one table from the names of array dimensions to mesh axes.

The model names its dimensions and never a mesh axis. To shard something in another way, change
`RULES`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from l1_jax.parallel.section import MESH_AXES

# Names of an array's dimensions; None: one that is never divided.
Dims = tuple[str | None, ...]

RULES: dict[str, str | tuple[str, ...] | None] = {
    # Activations: rows of the batch, and positions of the sequence in the order of `zigzag`.
    "batch": ("data", "fsdp"),
    "length": "context",
    # An element for each device: each process says its own.
    "device": MESH_AXES,
    # Parameters: the model width. Activations keep theirs whole.
    "embed": "fsdp",
    # Parameters and activations both.
    "heads": "tensor",
    "mlp": "tensor",
    # Embedding and logits are outside the pipeline, whose devices share them.
    "vocab": ("tensor", "pipeline"),
    # Parameters that are stacked over the layers.
    "layers": "pipeline",
    # Layers of what an optimizer takes matrix by matrix, and the same on the way there.
    "matrices": ("pipeline", "fsdp", "tensor"),
    "matrices_by_width": ("pipeline", "fsdp"),
    # Never divided.
    "head": None,
    "position": None,
    "qkv": None,
    "gate": None,
}


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array whose dimensions are called `axes` (None: not sharded)."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def named(mesh: Mesh | AbstractMesh, *axes: str | None) -> NamedSharding:
    """The placement on `mesh` of an array whose dimensions are called `axes`."""
    return NamedSharding(mesh, spec(axes))


def parameter_shardings(mesh: Mesh | AbstractMesh, axes: Any) -> Any:
    """Placements for a tree whose leaves are tuples of dimension names."""

    def place(names: tuple[str, ...]) -> NamedSharding:
        return named(mesh, *names)

    return jax.tree.map(place, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def is_divided() -> bool:
    """Whether arrays here may lie in parts on several devices.

    They do not without a mesh, nor inside `on_each_device`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return bool(set(mesh.axis_names) - set(mesh.manual_axes))


def is_only_data() -> bool:
    """Whether the mesh that is set has several devices, and divides the batch and nothing else."""
    mesh = jax.sharding.get_abstract_mesh()
    data_size = mesh.shape.get("data", 1)
    return data_size > 1 and data_size == mesh.size


def on_each_device(function: Callable[[Any, Any], Any], whole: Any, rows: Any) -> Any:
    """The sum over the devices of `function(whole, rows)` of each device's rows.

    It is for a mesh that `is_only_data`. Nothing is sent before that sum.

    Args:
        function: runs on each device by itself.
        whole: a tree of arrays that every device has.
        rows: a tree of arrays that begin with the dimension `batch`.
    """
    everywhere = PartitionSpec()
    divided = spec(("batch",))

    def local(whole: Any, rows: Any) -> Any:
        return jax.lax.psum(function(whole, rows), MESH_AXES)

    mapped = jax.shard_map(
        local, in_specs=(everywhere, divided), out_specs=everywhere, check_vma=False
    )
    return mapped(whole, rows)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the placement of an intermediate value; does nothing where `is_divided` is false."""
    if not is_divided():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def num_parts(axis: str) -> int:
    """Into how many parts the mesh that is set divides the dimension called `axis`."""
    mesh_axes = RULES[axis] or ()
    if isinstance(mesh_axes, str):
        mesh_axes = (mesh_axes,)

    if not is_divided():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in mesh_axes)
