"""Into how many parts a mesh divides a computation, and the order of a divided sequence."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import choose_microbatches
from l1_jax.errors import UserError
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import Dims, constrain


@dataclasses.dataclass(frozen=True)
class Layout:
    """Into how many parts a mesh divides a computation.

    For where code must know it; the rest is left to XLA.
    """

    rows: int = 1  # of the batch
    context: int = 1  # of the sequence
    stages: int = 1  # of the layers
    microbatches: int = 1  # of the rows, to pass through the stages

    @classmethod
    def of(
        cls, mesh: Mesh | AbstractMesh, batch_size: int = 1, microbatches: int | None = None
    ) -> "Layout":
        """The layout of `mesh`.

        Args:
            mesh: its axes have the sizes.
            batch_size: the rows of each part.
            microbatches: of these rows; None leaves the number to `choose_microbatches`.

        Raises:
            UserError: where `microbatches` does not divide the rows.
        """
        stages = mesh.shape["pipeline"]
        return cls(
            rows=mesh.shape["data"] * mesh.shape["fsdp"],
            context=mesh.shape["context"],
            stages=stages,
            microbatches=choose_microbatches(microbatches, batch_size, stages),
        )


ONE_DEVICE = Layout()


def zigzag(length: int, parts: int) -> np.ndarray:
    """The order in which the positions of a row lie: part i has chunks i and 2 `parts` - 1 - i.

    So every part has as many early positions as late ones, which look back on more: equal work.

    Args:
        length: of the row, in tokens.
        parts: into which the row is divided; each gets two chunks.

    Returns:
        int `[length]`.

    Source: Llama Team 2024 (The Llama 3 Herd of Models), arXiv:2407.21783, section 3.3.2.
    """
    if parts == 1:
        return np.arange(length)

    # The earliest chunk left goes with the latest.
    chunks = np.arange(length).reshape(2 * parts, -1)
    order = []
    for part in range(parts):
        early = chunks[part]
        late = chunks[2 * parts - 1 - part]
        order += [early, late]
    return np.concatenate(order)


def split_rows(tree: Any, dims: Any, count: int) -> Any:
    """`[B, ...]` -> `[count, B/count, ...]` for each array of `tree`.

    Part i has the rows congruent to i, so no row leaves its device.

    Args:
        tree: of arrays.
        dims: the names of their dimensions, of which the first is "batch", in their places.
        count: of parts.
    """

    def divide(x: jax.Array, names: Dims) -> jax.Array:
        assert len(names) == x.ndim, f"{names} of an array {x.shape}"
        assert names[0] == "batch", f"{names} do not begin with the rows"

        x = x.reshape(-1, count, *x.shape[1:])
        x = x.swapaxes(0, 1)
        return constrain(x, None, *names)

    return jax.tree.map(divide, tree, dims)


class _Need(NamedTuple):
    """A dimension of the model that the mesh axes divide."""

    size: int
    name: str  # as an error calls it: a key, where it begins with "model."
    axes: tuple[str, ...]
    chunks: int = 1  # that each device needs


def check_divisible(model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that each dimension of the model divides over its mesh axes.

    Raises:
        UserError: where one does not; it names the nearest sizes that would do.
    """
    needs = [
        _Need(model.n_embd, "model.n_embd", ("fsdp",)),
        _Need(model.n_heads, "model.n_heads", ("tensor",)),
        _Need(model.kv_heads, "model.n_kv_heads", ("tensor",)),
        _Need(model.hidden_size, "model.n_inner", ("tensor",)),
        _Need(model.n_layers, "model.n_layers", ("pipeline",)),
        _Need(model.padded_vocab_size, "the padded vocabulary", ("tensor", "pipeline")),
    ]
    # Each part of a divided sequence is two chunks, see `zigzag`.
    if mesh.shape["context"] > 1:
        length = model.max_seq_length
        needs.append(_Need(length, "model.max_seq_length", ("context",), chunks=2))

    for need in needs:
        num_devices = math.prod(mesh.shape[axis] for axis in need.axes)
        if need.size % (need.chunks * num_devices):
            raise _not_divisible(need, model, mesh)


def _not_divisible(need: _Need, model: ModelConfig, mesh: Mesh | AbstractMesh) -> UserError:
    """The error of a dimension that does not divide, with a remedy."""
    used_axes = [axis for axis in need.axes if mesh.shape[axis] > 1]
    num_devices = math.prod(mesh.shape[axis] for axis in used_axes)
    parts = need.chunks * num_devices

    divisor = " x ".join(f"parallelism.{axis} {mesh.shape[axis]}" for axis in used_axes)
    if need.chunks > 1:
        divisor += " x 2 chunks"

    # The largest number of devices below the one asked for that divides both model and mesh.
    fewer = [
        count
        for count in range(1, num_devices)
        if mesh.size % count == 0 and need.size % (need.chunks * count) == 0
    ]
    keys = " x ".join(f"parallelism.{axis}" for axis in used_axes)
    remedy = f"Set {keys} to {max(fewer, default=1)}"

    # Or a size near the one asked for; the vocabulary's is the tokenizer's, and has no key.
    if need.name.startswith("model."):
        multiples = range(parts, 2 * need.size + parts, parts)
        legal_sizes = [size for size in multiples if _is_legal(model, need.name, size)]
        if legal_sizes:
            nearest = min(legal_sizes, key=lambda size: abs(size - need.size))
            remedy += f", or {need.name} to {nearest}"

    return UserError(f"{need.name} {need.size} is not divisible by {divisor}", remedy)


def _is_legal(model: ModelConfig, name: str, size: int) -> bool:
    """Whether the key `name` may become `size`: heads, and groups of them, stay of equal size."""
    new: dict[str, Any] = {name.removeprefix("model."): size}
    changed = dataclasses.replace(model, **new)
    has_head_size = changed.head_size is not None
    heads_are_equal = has_head_size or changed.n_embd % changed.n_heads == 0
    groups_are_equal = changed.n_heads % changed.kv_heads == 0
    return heads_are_equal and groups_are_equal
