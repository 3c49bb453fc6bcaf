"""The loss of predicting the next token.

Legend: B batch, T length, D model width.
"""

from typing import Any

import jax
from flax import nnx

from l1_jax.objectives.cross_entropy import choose_num_chunks, loss_sum
from l1_jax.parallel.sharding import num_parts

Batch = dict[str, jax.Array]


def batch_loss(graphdef: nnx.GraphDef, params: Any, batch: Batch, keys_B: jax.Array | None = None) -> jax.Array:
    """sum(weight * nll) of a (micro)batch, float32."""
    model = nnx.merge(graphdef, params)
    x_BTD, _ = model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), keys_B)
    rows, length = batch["tokens"].shape
    vocab = params["token_embedding"].shape[0]
    num_chunks = choose_num_chunks(rows // num_parts("batch"), length // num_parts("length"), vocab)
    return loss_sum(model, x_BTD, batch["targets"], batch["weights"], num_chunks)
