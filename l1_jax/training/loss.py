"""Cross-entropy as sums and counts, never as means of means.

Legend: B batch, T length, D model width, V vocabulary (padded), C chunk of the length.
"""

import jax
import jax.numpy as jnp

from l1_jax.model.transformer import LanguageModel

# Logits are the largest array of a step; above this many bytes on a device they are made and used in parts.
MAX_LOGITS_BYTES = 256 * 2**20


def negative_log_likelihood(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) in nats, float32 `[B, T]`."""
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


def loss_sum(
    model: LanguageModel, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, num_chunks: int = 1
) -> jax.Array:
    """sum(weight * nll) in nats, float32 scalar.

    Args:
        model: for its head.
        x_BTD: hidden states after the final norm.
        targets_BT: int32 token ids.
        weights_BT: float32; 0 where a target does not count.
        num_chunks: parts of the length whose logits exist at one time; it divides T.
    """

    def part(x_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array) -> jax.Array:
        return jnp.sum(weights_BC * negative_log_likelihood(model.logits(x_BCD), targets_BC))

    if num_chunks == 1:
        return part(x_BTD, targets_BT, weights_BT)

    def chunks(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], num_chunks, -1, *x.shape[2:]).swapaxes(0, 1)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(part)(*chunk), None

    return jax.lax.scan(body, jnp.zeros(()), (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT)))[0]


def choose_num_chunks(rows_per_device: int, length: int, vocab: int) -> int:
    """The fewest equal parts of the length whose float32 logits fit `MAX_LOGITS_BYTES`."""
    fits = (
        n
        for n in range(1, length + 1)
        if length % n == 0 and rows_per_device * length // n * vocab * 4 <= MAX_LOGITS_BYTES
    )
    return next(fits, length)
