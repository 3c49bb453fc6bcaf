"""The loss of predicting the next token.

Legend: B batch, T length, D model width.
"""

from typing import Any

import jax
from flax import nnx

from l1_jax.objectives.cross_entropy import choose_num_chunks, loss_sum
from l1_jax.parallel.sharding import num_parts

Batch = dict[str, jax.Array]


def batch_loss(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, keys_B: jax.Array | None = None
) -> jax.Array:
    """sum(weight * nll) of a (micro)batch, float32 scalar, in nats.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        params: all of its parameters.
        batch: `tokens`, `targets` int32 `[B, T]`, `weights` float32 `[B, T]`, and `positions`,
            `segment_ids` int32 `[B, T]` where documents are kept apart.
        keys_B: a dropout key per row; None drops nothing.
    """
    model = nnx.merge(graphdef, params)
    output = model(
        batch["tokens"],
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        dropout_keys_B=keys_B,
    )

    # By what lies on each device. Rows of the table, with padding: logits have as many.
    rows, length = batch["tokens"].shape
    num_chunks = choose_num_chunks(
        rows=rows // num_parts("batch"),
        length=length // num_parts("length"),
        vocab=params["token_embedding"].shape[0],
    )
    return loss_sum(model, output.hidden, batch["targets"], batch["weights"], num_chunks)
