"""Into how many parts a mesh divides a computation, and the order of a divided sequence."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from l1_jax.errors import UserError
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain


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
