"""Cross-entropy as sums and counts, never as means of means.

Legend: B batch, T length, D model width, V vocabulary (padded), R and C parts of the rows and of the length.
"""

import jax
import jax.numpy as jnp

from l1_jax.model.transformer import LanguageModel
from l1_jax.parallel.sharding import constrain

# Logits are the largest array of a step; above this many bytes on a device they are made and used in parts.
MAX_LOGITS_BYTES = 256 * 2**20


def loss_sum(
    model: LanguageModel, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, num_chunks: int = 1
) -> jax.Array:
    """sum(weight * nll) in nats, float32 scalar; a weight of 0 is a target that does not count.

    `x_BTD` are hidden states after the final norm. The length is cut into `num_chunks` equal parts, which divide it;
    the logits of only one part exist at a time.
    """
    # A table for each part of the batch that has its own devices, so that the table is gathered once and its gradient
    # summed over the devices once: with one table for all, XLA would do both in every turn of the loop.
    layout, tables_RCVD = model.layout, None
    if layout.rows * layout.context > 1:
        table_VD = model.table()
        tables_RCVD = jnp.broadcast_to(table_VD, (layout.rows, layout.context, *table_VD.shape))
        tables_RCVD = constrain(tables_RCVD, "batch", "length", "vocab", None)

    def part(x: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = model.logits(x, tables_RCVD)
        likelihood = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - likelihood))

    if num_chunks == 1:
        return part(x_BTD, targets_BT, weights_BT)

    def cut(x: jax.Array) -> jax.Array:  # every num_chunks-th position, so that each part is on all devices
        return jnp.moveaxis(x.reshape(x.shape[0], -1, num_chunks, *x.shape[2:]), 2, 0)

    def add(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(part)(*chunk), None

    return jax.lax.scan(add, jnp.zeros(()), (cut(x_BTD), cut(targets_BT), cut(weights_BT)))[0]


def choose_num_chunks(rows: int, length: int, vocab: int) -> int:
    """The fewest equal parts of the length whose float32 logits fit `MAX_LOGITS_BYTES`; all sizes are of one device."""
    most = MAX_LOGITS_BYTES // (4 * vocab * rows)  # positions at a time
    return next((n for n in range(1, length) if length % n == 0 and length // n <= most), length)
