"""What is placed where: one table from the names of array dimensions to mesh axes.

The model names its dimensions and never a mesh axis. To shard something in another way, change `RULES`.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from l1_jax.config import MESH_AXES, ModelConfig
from l1_jax.errors import UserError

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


def choose_microbatches(asked: int | None, batch_size: int, stages: int) -> int:
    """Into how many equal parts `batch_size` rows pass through a pipeline: as many as divide it, up to 4 a stage."""
    wanted = asked or (4 * stages if stages > 1 else 1)
    near = max(count for count in range(1, min(wanted, batch_size) + 1) if batch_size % count == 0)
    if asked not in (None, near):
        what = f"parallelism.pipeline_microbatches {asked} does not divide the {batch_size} sequences a device"
        raise UserError(what, f"Set it to {near}, or to null")
    return near


@dataclasses.dataclass(frozen=True)
class Layout:
    """Into how many parts a mesh divides a computation, where code must know it; the rest is left to XLA."""

    rows: int = 1  # of the batch
    context: int = 1  # of the sequence
    stages: int = 1  # of the layers
    microbatches: int = 1  # of the rows, to pass through the stages

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, batch_size: int = 1, microbatches: int | None = None) -> "Layout":
        """`batch_size` is the rows of each part; `microbatches` of them if given, else by `choose_microbatches`."""
        rows, stages = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["pipeline"]
        return cls(rows, mesh.shape["context"], stages, choose_microbatches(microbatches, batch_size, stages))


ONE_DEVICE = Layout()


def zigzag(length: int, parts: int) -> np.ndarray:
    """The order in which the positions of a row lie, int `[length]`: part i has chunks i and 2 `parts` - 1 - i.

    So every part has as many early positions as late ones, which look back on more: equal work. Source: Llama Team
    2024 (The Llama 3 Herd of Models), arXiv:2407.21783, section 3.3.2.
    """
    if parts == 1:
        return np.arange(length)
    chunks = np.arange(length).reshape(2 * parts, -1)
    return np.concatenate([chunks[[i, 2 * parts - 1 - i]].ravel() for i in range(parts)])


def split_rows(tree: Any, count: int) -> Any:
    """`[B, ...]` -> `[count, B/count, ...]`: part i has the rows congruent to i, so no row leaves its device."""

    def divide(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *("length", *(None,) * (x.ndim - 3))[: x.ndim - 2])

    return jax.tree.map(divide, tree)


def check_divisible(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where a dimension of the model does not divide over its mesh axes."""
    needs = [
        (model.n_embd, "model.n_embd", ("fsdp",), 1),
        (model.n_heads, "model.n_heads", ("tensor",), 1),
        (model.kv_heads, "model.n_kv_heads", ("tensor",), 1),
        (model.hidden_size, "model.n_inner", ("tensor",), 1),
        (model.n_layers, "model.n_layers", ("pipeline",), 1),
        (model.padded_vocab_size, "the padded vocabulary", ("tensor", "pipeline"), 1),
    ]
    if mesh.shape["context"] > 1:
        needs.append((model.max_seq_length, "model.max_seq_length", ("context",), 2))  # two chunks each, see `zigzag`
    for size, name, axes, chunks in needs:
        used = [axis for axis in axes if mesh.shape[axis] > 1]
        parts = chunks * math.prod(mesh.shape[axis] for axis in used)
        if size % parts:
            legal = (n for n in range(1, parts // chunks) if mesh.size % n == 0 and size % (n * chunks) == 0)
            near = max(legal, default=1)
            sizes = (n for n in range(parts, 2 * size + parts, parts) if _is_legal(model, name, n))
            nearby = min(sizes, key=lambda n: abs(n - size), default=None)
            axis = " x ".join(f"parallelism.{axis} {mesh.shape[axis]}" for axis in used) + " x 2 chunks" * (chunks - 1)
            remedy = f"Set {' x '.join(f'parallelism.{axis}' for axis in used)} to {near}"
            remedy += f", or {name} to {nearby}" if nearby and name.startswith("model.") else ""
            raise UserError(f"{name} {size} is not divisible by {axis}", remedy)


def _is_legal(model: ModelConfig, name: str, size: int) -> bool:
    """Whether heads of equal size, and groups of them, are left where `name` becomes `size`."""
    new: dict[str, Any] = {name[6:]: size} if name.startswith("model.") else {}
    changed = dataclasses.replace(model, **new)
    return changed.n_embd % changed.n_heads == changed.n_heads % changed.kv_heads == 0


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
