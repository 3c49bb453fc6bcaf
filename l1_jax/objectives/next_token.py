"""The loss of predicting the next token.

Legend: B batch, T length.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from l1_jax.model.context import Output, Sum, Sums
from l1_jax.model.transformer import LanguageModel
from l1_jax.objectives.chunks import fit_chunks
from l1_jax.objectives.cross_entropy import LossSums, loss_sum
from l1_jax.objectives.objective import Batch, Terms


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

    def num_tokens(self, batch: Batch) -> jax.Array:
        """The number of targets that count."""
        return batch["weights"].sum()

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
        sums, added = _losses(graphdef, params, batch, keys_B, z_loss=self.z_loss)

        loss = sums.nll
        metrics = dict(added)
        assert not metrics.keys() & {"loss", "z_loss"}, "names of the objective's own terms"

        if sums.z_loss is not None:
            loss += sums.z_loss
            metrics["z_loss"] = Sum(sums.z_loss, self.weight(batch))

        for term in added.values():
            loss += term.total

        # Where more is minimised than what is to be compared with other runs.
        if metrics:
            metrics["loss"] = Sum(sums.nll, self.weight(batch))

        return Terms(loss, metrics)

    def validate(self, graphdef: nnx.GraphDef, params: Any, borrowed: Any, batch: Batch) -> Sum:
        """The negative log-likelihood in nats, of the targets that count, and nothing beside it."""
        sums, _ = _losses(graphdef, params, batch)
        return Sum(sums.nll, self.weight(batch))


def run_model(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, keys_B: jax.Array | None = None
) -> tuple[LanguageModel, Output]:
    """A model, and what it gives for the tokens of a batch; its arguments are those of an
    `Objective`."""
    model = nnx.merge(graphdef, params)
    output = model(
        batch["tokens"],
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        dropout_keys_B=keys_B,
    )
    return model, output


def _losses(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: Batch,
    keys_B: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[LossSums, Sums]:
    """The loss of the targets, and what the layers add to it."""
    model, output = run_model(graphdef, params, batch, keys_B)

    num_chunks = fit_chunks(model, output.hidden)
    sums = loss_sum(model, output.hidden, batch["targets"], batch["weights"], num_chunks, z_loss)
    return sums, output.sums
