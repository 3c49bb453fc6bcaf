"""The loss of predicting the next token.

Legend: B batch, T length.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from l1_jax.model.context import Sum
from l1_jax.objectives.cross_entropy import choose_num_chunks, loss_sum
from l1_jax.objectives.objective import Batch, Terms
from l1_jax.parallel.sharding import num_parts


@dataclasses.dataclass(frozen=True)
class NextToken:
    """sum(weight * nll) / sum(weight), in nats.

    The fields of a batch are `tokens`, `targets` int32 `[B, T]`, `weights` float32 `[B, T]`, and
    `positions`, `segment_ids` int32 `[B, T]` where documents are kept apart.

    Args:
        z_loss: the weight of sum(weight * log(Z)^2), with Z the softmax's denominator: it keeps
            logits near those of a normalised softmax.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5, of the z-loss.
    """

    z_loss: float = 0.0

    def weight(self, batch: Batch) -> jax.Array:
        """The number of targets that count."""
        return batch["weights"].sum()

    def __call__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        borrowed: Any,
        batch: Batch,
        keys_B: jax.Array | None = None,
    ) -> Terms:
        """See `Objective`. What the layers add up is added to the loss as it is."""
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
        sums = loss_sum(
            model, output.hidden, batch["targets"], batch["weights"], num_chunks, self.z_loss
        )

        loss = sums.nll
        metrics = dict(output.sums)
        assert not metrics.keys() & {"loss", "z_loss"}, "names of the objective's own terms"

        if sums.z_loss is not None:
            loss += sums.z_loss
            metrics["z_loss"] = Sum(sums.z_loss, self.weight(batch))

        for term in output.sums.values():
            loss += term.total

        # Where more is minimised than what is to be compared with other runs.
        if metrics:
            metrics["loss"] = Sum(sums.nll, self.weight(batch))

        return Terms(loss, metrics)
