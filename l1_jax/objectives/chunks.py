"""The logits of a head in parts of the length, so that those of only one part exist at a time.

Legend: B batch, T length, D model width, V vocabulary (padded), R and C parts of the rows and of
    the length.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from l1_jax.model.layers import einsum_float32
from l1_jax.model.transformer import LanguageModel
from l1_jax.parallel.sharding import constrain, num_parts

# Logits are the largest array of a step; above this many bytes on a device they are made and used
# in parts.
MAX_LOGITS_BYTES = 256 * 2**20


def choose_num_chunks(rows: int, length: int, vocab: int) -> int:
    """Into how many parts the length is cut, so that the logits of each fit `MAX_LOGITS_BYTES`.

    Args:
        rows: of a device, as are the other two.
        length: in tokens.
        vocab: rows of the table.
    """
    float32_bytes = 4
    most_positions = MAX_LOGITS_BYTES // (float32_bytes * vocab * rows)
    needed = -(-length // max(most_positions, 1))

    # The fewest that divide the length, unless that is more than twice as many as are needed: a
    # prime length would be cut into single positions.
    dividing = next(count for count in range(needed, length + 1) if length % count == 0)
    return dividing if dividing <= 2 * needed else needed


def fit_chunks(model: LanguageModel, x_BTD: jax.Array) -> int:
    """`choose_num_chunks` by what lies on each device of the mesh that is set.

    Args:
        model: whose head is used.
        x_BTD: hidden states after the final norm.
    """
    rows, length, _ = x_BTD.shape
    return choose_num_chunks(
        rows=rows // num_parts("batch"),
        length=length // num_parts("length"),
        # With padding, for logits have it.
        vocab=model.config.padded_vocab_size,
    )


def spread_table(model: LanguageModel) -> jax.Array:
    """The table of the head, float32 `[V, D]`, or `[R, C, V, D]` where devices share the batch.

    That is a table for each part of the batch that has its own devices, so that the table is
    gathered once and its gradient summed over the devices once: with one table for all, XLA would
    do both in every turn of the loop.
    """
    rows = num_parts("batch")
    lengths = num_parts("length")
    table = model.table()

    if rows * lengths > 1:
        table = jnp.broadcast_to(table, (rows, lengths, *table.shape))
        table = constrain(table, "batch", "length", "vocab", None)
    return table


def project_gradients(
    x_BTD: jax.Array, table: jax.Array, d_logits_BTV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `project`, of x and of the table.

    The table's is float32 `[D, V]`, or `[R, C, D, V]`: the other way round XLA would turn all
    d_logits.
    """
    table = table.astype(x_BTD.dtype)
    if table.ndim == 2:
        d_x_BTD = jnp.einsum("BTV,VD->BTD", d_logits_BTV, table)
        d_table_DV = einsum_float32("BTD,BTV->DV", x_BTD, d_logits_BTV)
        return d_x_BTD, d_table_DV

    def in_parts(y: jax.Array) -> jax.Array:
        rows, lengths = table.shape[:2]
        batch, length, last = y.shape
        return y.reshape(rows, batch // rows, lengths, length // lengths, last)

    d_x_RBCTD = jnp.einsum("RBCTV,RCVD->RBCTD", in_parts(d_logits_BTV), table)
    d_x_BTD = d_x_RBCTD.reshape(x_BTD.shape)
    d_table_RCDV = einsum_float32("RBCTD,RBCTV->RCDV", in_parts(x_BTD), in_parts(d_logits_BTV))
    return d_x_BTD, d_table_RCDV


def over_chunks(add: Callable[..., Any], start: Any, num_chunks: int, arrays: Any) -> Any:
    """`jax.lax.scan` of `add` over equal parts of the length of `[B, T, ...]` arrays.

    With one part there is no loop.

    Args:
        add: `add(carry, part of the arrays)` is the next carry, and arrays `[B, part, ...]`.
        start: the first carry.
        num_chunks: into how many parts the length is cut.
        arrays: a tree of them.

    Returns:
        The last carry, and the arrays of all parts, joined to `[B, T, ...]`.
    """
    if num_chunks == 1:
        return add(start, arrays)

    chunks = jax.tree.map(functools.partial(_cut, num_chunks=num_chunks), arrays)
    total, parts = jax.lax.scan(add, start, chunks)

    rows_and_length = jax.tree.leaves(arrays)[0].shape[:2]
    return total, jax.tree.map(lambda x: _join(x, (*rows_and_length, *x.shape[3:])), parts)


def _cut(x: jax.Array, num_chunks: int) -> jax.Array:
    """`[B, T, ...]` -> `[num_chunks, B, T / num_chunks, ...]`.

    A part is every num_chunks-th position, so that each is on all devices. What is missing to equal
    parts is 0.
    """
    rows, length, *rest = x.shape
    parts = num_parts("length")

    # Each device's own positions are filled up, so that none moves to another device.
    own_length = length // parts
    missing = -own_length % num_chunks
    if missing:
        x = x.reshape(rows, parts, own_length, *rest)
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, missing)
        x = jnp.pad(x, widths)

    x = x.reshape(rows, -1, num_chunks, *rest)
    return jnp.moveaxis(x, 2, 0)


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The array of this shape of which `_cut` made the chunks."""
    rows, length, *rest = shape
    parts = num_parts("length")

    x = jnp.moveaxis(chunks, 0, 2)
    if x.shape[1] * x.shape[2] > length:
        x = x.reshape(rows, parts, -1, *rest)[:, :, : length // parts]
    return x.reshape(shape)
