"""What is placed where: one table from the names of array dimensions to mesh axes.

The model names its dimensions and never a mesh axis. To shard something in another way, change `RULES`.
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from l1_jax.parallel.section import MESH_AXES

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # activations: rows of the batch
    "length": "context",  # activations: positions of the sequence, in the order of `zigzag`
    "embed": "fsdp",  # parameters: the model width (activations keep theirs whole)
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": ("tensor", "pipeline"),  # embedding and logits are outside the pipeline, whose devices share them
    "layers": "pipeline",
    "matrices": ("pipeline", "fsdp", "tensor"),  # layers, of what an optimizer takes matrix by matrix
    "matrices_by_width": ("pipeline", "fsdp"),  # ... on the way there
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
    return jax.tree.map(lambda names: named(mesh, *names), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def is_divided() -> bool:
    """Whether arrays here may lie in parts on several devices: not without a mesh, nor inside `on_each_device`."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(set(mesh.axis_names) - set(mesh.manual_axes))


def is_only_data() -> bool:
    """Whether the mesh that is set has several devices, and divides the batch and nothing else."""
    return 1 < jax.sharding.get_abstract_mesh().shape.get("data", 1) == jax.sharding.get_abstract_mesh().size


def on_each_device(function: Any, whole: Any, rows: Any) -> Any:
    """The sum over the devices of `function(whole, rows)` of each device's rows, where `is_only_data`. Nothing is sent
    before that sum."""
    everywhere, divided = PartitionSpec(), spec(("batch",))
    local = jax.shard_map(
        lambda *args: jax.lax.psum(function(*args), MESH_AXES),
        in_specs=(everywhere, divided), out_specs=everywhere, check_vma=False,
    )  # fmt: skip
    return local(whole, rows)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the placement of an intermediate value; does nothing where `is_divided` is false."""
    if not is_divided():
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes))


def num_parts(axis: str) -> int:
    """Into how many parts the mesh that is set divides the dimension called `axis`."""
    sizes, used = jax.sharding.get_abstract_mesh().shape if is_divided() else {}, RULES[axis] or ()
    return math.prod(sizes.get(name, 1) for name in ([used] if isinstance(used, str) else used))
