"""Cross-entropy as sums and counts, never means of means; its gradient comes in the same pass.

Legend: B batch, T length, D model width, V vocabulary (padded).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l1_jax.model.transformer import LanguageModel, mask_padding, project, soften
from l1_jax.objectives.chunks import over_chunks, project_gradients, spread_table


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
    head = _Head(model.config.vocab_size, model.config.logit_softcap, z_loss)
    return _loss_sum(num_chunks, head, x_BTD, spread_table(model), targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss_sum(num_chunks, head, x_BTD, table, targets_BT, weights_BT):
    def add(total, chunk):
        return _add(total, _softmax_nll(head, table, *chunk).loss), None

    total, _ = over_chunks(add, _no_loss(head), num_chunks, (x_BTD, targets_BT, weights_BT))
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

        d_x, d_table_of_chunk = project_gradients(x, table, d_logits.astype(x.dtype))
        return (_add(total, softmax.loss), d_table + d_table_of_chunk), d_x

    # The table's gradient lies as `project_gradients` makes it.
    start = (_no_loss(head), jnp.zeros_like(table.swapaxes(-1, -2)))
    (total, d_table), d_x = over_chunks(add, start, num_chunks, (x_BTD, targets_BT, weights_BT))
    return total, (d_x, d_table.swapaxes(-1, -2))


def _scale(num_chunks, head, gradients, d_total):
    """The backward pass: the gradients of the sum of the losses are there, and that alone is to be
    differentiated; targets and weights have none."""
    d_x, d_table = gradients
    slope = d_total.nll
    return (slope * d_x).astype(d_x.dtype), slope * d_table, None, None


_loss_sum.defvjp(_loss_and_gradient, _scale)


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
