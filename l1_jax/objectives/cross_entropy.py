"""Cross-entropy as sums and counts, never means of means; its gradient comes in the same pass.

Legend: B batch, T length, D model width, V vocabulary (padded), R and C parts of the rows and of
    the length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l1_jax.model.layers import einsum_float32
from l1_jax.model.transformer import LanguageModel, mask_padding, project, soften
from l1_jax.parallel.sharding import constrain, num_parts

# Logits are the largest array of a step; above this many bytes on a device they are made and used
# in parts.
MAX_LOGITS_BYTES = 256 * 2**20


class LossSums(NamedTuple):
    """Float32 scalars. Only their sum can be differentiated: whoever takes one takes the other."""

    nll: jax.Array  # sum(weight * nll), in nats
    z_loss: jax.Array | None  # z_loss * sum(weight * log(Z)^2); None where that is no term


class _Head(NamedTuple):
    """What the head of a model does to the products with its table."""

    vocab_size: int
    softcap: float | None
    z_loss: float


def loss_sum(
    model: LanguageModel,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    num_chunks: int = 1,
    z_loss: float = 0.0,
) -> LossSums:
    """sum(weight * nll) in nats, and with it the z-loss.

    The length is cut into equal parts, filled up with targets of weight 0 where they do not divide
    it; the logits of only one part exist at a time. Where a gradient is wanted, each part's is made
    while its logits are there, so that nothing is computed twice and no logits are kept for the
    backward pass.

    Args:
        model: whose head is used.
        x_BTD: hidden states after the final norm.
        targets_BT: int32, the tokens that come next.
        weights_BT: float32; a weight of 0 is a target that does not count.
        num_chunks: into how many parts the length is cut, see `choose_num_chunks`.
        z_loss: the weight of log(Z)^2, with Z the softmax's denominator; 0 is none.
    """
    rows = num_parts("batch")
    lengths = num_parts("length")
    table = model.table()

    # A table for each part of the batch that has its own devices, so that the table is gathered
    # once and its gradient summed over the devices once: with one table for all, XLA would do both
    # in every turn of the loop.
    if rows * lengths > 1:
        table = jnp.broadcast_to(table, (rows, lengths, *table.shape))
        table = constrain(table, "batch", "length", "vocab", None)

    head = _Head(model.config.vocab_size, model.config.logit_softcap, z_loss)
    return _loss_sum(num_chunks, head, x_BTD, table, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sum(num_chunks, head, x_BTD, table, targets_BT, weights_BT):
    def add(total, chunk):
        return _add(total, _softmax_nll(head, table, *chunk).loss), None

    total, _ = _over_chunks(add, _no_loss(head), num_chunks, (x_BTD, targets_BT, weights_BT))
    return total


def _loss_and_gradient(num_chunks, head, x_BTD, table, targets_BT, weights_BT):
    """The loss, and the gradients of x and of the table."""

    def add(carry, chunk):
        total, d_table = carry
        x, targets, weights = chunk
        softmax = _softmax_nll(head, table, x, targets, weights)

        # d nll / d logits = softmax - one-hot, and d log(Z)^2 / d logits = 2 log(Z) softmax
        vocab = jnp.arange(softmax.exps.shape[-1])[None, None]
        is_target = vocab == targets[..., None]
        slopes = weights[..., None] / softmax.sums
        if head.z_loss:
            slopes *= 1 + 2 * head.z_loss * softmax.log_sums
        scaled_softmax = softmax.exps * slopes
        d_logits = scaled_softmax - jnp.where(is_target, weights[..., None], 0)

        # d softcap tanh(z) / dz; padding is -softcap here, where the slope is 0
        if head.softcap:
            capped = jnp.maximum(softmax.logits, -head.softcap) / head.softcap
            d_logits *= 1 - jnp.square(capped)

        d_x, d_table_of_chunk = _project_gradients(x, table, d_logits.astype(x.dtype))
        return (_add(total, softmax.loss), d_table + d_table_of_chunk), d_x

    # The table's gradient lies as `_project_gradients` makes it.
    start = (_no_loss(head), jnp.zeros_like(table.swapaxes(-1, -2)))
    (total, d_table), d_x = _over_chunks(add, start, num_chunks, (x_BTD, targets_BT, weights_BT))
    if num_chunks > 1:
        d_x = _join(d_x, x_BTD.shape)
    return total, (d_x, d_table.swapaxes(-1, -2))


def _scale(num_chunks, head, gradients, d_total):
    """The backward pass: the gradients of the sum of the losses are there, and that alone is to be
    differentiated; targets and weights have none."""
    d_x, d_table = gradients
    slope = d_total.nll
    return (slope * d_x).astype(d_x.dtype), slope * d_table, None, None


_loss_sum.defvjp(_loss_and_gradient, _scale)


def _project_gradients(x_BTD, table, d_logits_BTV):
    """The gradients of `project`, of x and of the table.

    The table's is `[D, V]`, or `[R, C, D, V]`: the other way round XLA would turn all d_logits.
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


class _SoftmaxNll(NamedTuple):
    """The loss of a part, and its softmax, `exps / sums`."""

    loss: LossSums
    logits: jax.Array  # [B, T, V]
    exps: jax.Array  # [B, T, V], exp(logits - their largest)
    sums: jax.Array  # [B, T, 1], of exps
    log_sums: jax.Array  # [B, T, 1], log(Z), of all exps of logits


def _no_loss(head):
    return LossSums(jnp.zeros(()), jnp.zeros(()) if head.z_loss else None)


def _add(one, other):
    return jax.tree.map(jnp.add, one, other)


def _softmax_nll(head, table, x_BTD, targets_BT, weights_BT):
    """`_SoftmaxNll` of hidden states and their targets."""
    logits_BTV = soften(project(x_BTD, table), head.softcap)
    logits_BTV = mask_padding(logits_BTV, head.vocab_size)

    largest_BT1 = logits_BTV.max(axis=-1, keepdims=True)
    exps_BTV = jnp.exp(logits_BTV - largest_BT1)
    sums_BT1 = exps_BTV.sum(axis=-1, keepdims=True)

    target_logits_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
    weights_BT1 = weights_BT[..., None]
    log_sums_BT1 = jnp.log(sums_BT1) + largest_BT1
    nll = jnp.sum(weights_BT1 * (log_sums_BT1 - target_logits_BT1))

    z_loss = None
    if head.z_loss:
        z_loss = head.z_loss * jnp.sum(weights_BT1 * jnp.square(log_sums_BT1))
    return _SoftmaxNll(LossSums(nll, z_loss), logits_BTV, exps_BTV, sums_BT1, log_sums_BT1)


def _over_chunks(add, start, num_chunks, arrays):
    """`jax.lax.scan` of `add` over equal parts of the length of `[B, T, ...]` arrays.

    With one part there is no loop.
    """
    if num_chunks == 1:
        return add(start, arrays)

    chunks = tuple(_cut(x, num_chunks) for x in arrays)
    return jax.lax.scan(add, start, chunks)


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
