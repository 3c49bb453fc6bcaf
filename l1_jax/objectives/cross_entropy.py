"""Cross-entropy as sums and counts, never as means of means; its gradient is made in the same pass.

Legend: B batch, T length, D model width, V vocabulary (padded), R and C parts of the rows and of
    the length.
"""

import functools

import jax
import jax.numpy as jnp

from l1_jax.model.layers import einsum_float32
from l1_jax.model.transformer import LanguageModel, mask_padding, project, soften
from l1_jax.parallel.sharding import constrain, num_parts

# Logits are the largest array of a step; above this many bytes on a device they are made and used
# in parts.
MAX_LOGITS_BYTES = 256 * 2**20


def loss_sum(
    model: LanguageModel,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    num_chunks: int = 1,
) -> jax.Array:
    """sum(weight * nll) in nats, float32 scalar; a weight of 0 is a target that does not count.

    `x_BTD` are hidden states after the final norm. The length is cut into `num_chunks` equal parts,
    filled up with targets of weight 0 where they do not divide it; the logits of only one part
    exist at a time. Where a gradient is wanted, each part's is made while its logits are there, so
    that nothing is computed twice and no logits are kept for the backward pass.
    """
    # A table for each part of the batch that has its own devices, so that the table is gathered
    # once and its gradient summed over the devices once: with one table for all, XLA would do both
    # in every turn of the loop.
    rows, lengths, table = num_parts("batch"), num_parts("length"), model.table()
    if rows * lengths > 1:
        table = jnp.broadcast_to(table, (rows, lengths, *table.shape))
        table = constrain(table, "batch", "length", "vocab", None)
    head = (model.config.vocab_size, model.config.logit_softcap)
    return _loss_sum(num_chunks, head, x_BTD, table, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sum(num_chunks, head, x_BTD, table, targets_BT, weights_BT):
    def add(total, chunk):
        return total + _nll(head, table, *chunk)[0], None

    return _over_chunks(add, jnp.zeros(()), num_chunks, (x_BTD, targets_BT, weights_BT))[0]


def _loss_and_gradient(num_chunks, head, x_BTD, table, targets_BT, weights_BT):
    def add(carry, chunk):
        (total, d_table), (x, targets, weights) = carry, chunk
        nll, logits, exps, sums = _nll(head, table, x, targets, weights)
        is_target = jnp.arange(exps.shape[-1])[None, None] == targets[..., None]
        # d nll / d logits = softmax - one-hot
        d_logits = exps * (weights[..., None] / sums) - jnp.where(is_target, weights[..., None], 0)
        if softcap := head[
            1
        ]:  # d softcap tanh(z) / dz; padding is -softcap here, where the slope is 0
            d_logits *= 1 - jnp.square(jnp.maximum(logits, -softcap) / softcap)
        d_x, more = _project_gradients(x, table, d_logits.astype(x.dtype))
        return (total + nll, d_table + more), d_x

    start = (jnp.zeros(()), jnp.zeros_like(table.swapaxes(-1, -2)))
    (total, d_table), d_x = _over_chunks(add, start, num_chunks, (x_BTD, targets_BT, weights_BT))
    if num_chunks > 1:
        d_x = _join(d_x, x_BTD.shape)
    return total, (d_x, d_table.swapaxes(-1, -2))


def _project_gradients(x_BTD, table, d_logits_BTV):
    """Of `project`; the table's is `[D, V]`, or `[R, C, D, V]`: the other way round XLA would turn
    all d_logits."""
    table = table.astype(x_BTD.dtype)
    if table.ndim == 2:
        d_x_BTD = jnp.einsum("BTV,VD->BTD", d_logits_BTV, table)
        return d_x_BTD, einsum_float32("BTD,BTV->DV", x_BTD, d_logits_BTV)

    def parts(y: jax.Array) -> jax.Array:
        rows, lengths = table.shape[:2]
        return y.reshape(rows, y.shape[0] // rows, lengths, y.shape[1] // lengths, y.shape[2])

    d_x_RBCTD = jnp.einsum("RBCTV,RCVD->RBCTD", parts(d_logits_BTV), table)
    return d_x_RBCTD.reshape(x_BTD.shape), einsum_float32(
        "RBCTD,RBCTV->RCDV", parts(x_BTD), parts(d_logits_BTV)
    )


def _nll(head, table, x, targets, weights):
    """sum(weight * nll); the logits; and exp(logits - their largest), with its sums over V."""
    vocab_size, softcap = head
    logits = mask_padding(soften(project(x, table), softcap), vocab_size)
    largest = logits.max(axis=-1, keepdims=True)
    exps = jnp.exp(logits - largest)
    sums = exps.sum(axis=-1, keepdims=True)
    likelihood = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return jnp.sum(weights[..., None] * (jnp.log(sums) + largest - likelihood)), logits, exps, sums


def _over_chunks(add, start, num_chunks, arrays):
    """`jax.lax.scan` of `add` over equal parts of the length of `[B, T, ...]` arrays; with one
    part, without a loop."""
    if num_chunks == 1:
        return add(start, arrays)

    return jax.lax.scan(add, start, tuple(_cut(x, num_chunks) for x in arrays))


def _cut(x: jax.Array, num_chunks: int) -> jax.Array:
    """`[B, T, ...]` -> `[num_chunks, B, T / num_chunks, ...]`: every num_chunks-th position, so
    that each part is on all devices. What is missing to equal parts is 0."""
    rows, length, *rest = x.shape
    parts = num_parts("length")

    # Each device's own positions are filled up, so that none moves to another device.
    if missing := -(length // parts) % num_chunks:
        x = x.reshape(rows, parts, length // parts, *rest)
        x = jnp.pad(x, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * len(rest)])

    return jnp.moveaxis(x.reshape(rows, -1, num_chunks, *rest), 2, 0)


def _join(chunks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The array of this shape of which `_cut` made the chunks."""
    rows, length, *rest = shape
    parts = num_parts("length")

    x = jnp.moveaxis(chunks, 0, 2)
    if x.shape[1] * x.shape[2] > length:
        x = x.reshape(rows, parts, -1, *rest)[:, :, : length // parts]
    return x.reshape(shape)


def _scale(num_chunks, head, gradients, d_total):
    d_x, d_table = gradients
    return (d_total * d_x).astype(d_x.dtype), d_total * d_table, None, None


_loss_sum.defvjp(_loss_and_gradient, _scale)


def choose_num_chunks(rows: int, length: int, vocab: int) -> int:
    """Into how many parts the length is cut, so that the float32 logits of each fit
    `MAX_LOGITS_BYTES`; all sizes are of one device. The fewest that divide the length, unless that
    is more than twice as many as are needed: a prime length would be cut into single positions."""
    most = MAX_LOGITS_BYTES // (4 * vocab * rows)  # positions at a time
    needed = -(-length // max(most, 1))
    dividing = next(n for n in range(needed, length + 1) if length % n == 0)
    return dividing if dividing <= 2 * needed else needed
