"""What a run minimises, as a protocol: a second loss is a file beside `next_token.py`.

Legend: B batch.
"""

from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from l1_jax.model.context import Sum, Sums

# Fields by name: arrays that begin with the rows.
Batch = dict[str, jax.Array]


class Terms(NamedTuple):
    """What the rows of a batch, or of a part of it, give. Parts are added up, and divided once.

    Attributes:
        loss: float32 scalar, what is minimised, once it is divided by the batch's weight.
        metrics: what else is logged, each divided by its own weight. One that is called `loss`
            stands in the log for the above.
    """

    loss: jax.Array
    metrics: Sums


class Objective(Protocol):
    """A loss, as sums over rows."""

    def num_tokens(self, batch: Batch) -> jax.Array:
        """How many tokens of a batch are learned from, float32 scalar: the run counts them."""
        ...

    def weight(self, batch: Batch) -> jax.Array:
        """By what the loss of a batch is divided, float32 scalar; known without the model."""
        ...

    def __call__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        borrowed: Any,
        batch: Batch,
        keys_B: jax.Array | None = None,
    ) -> Terms:
        """The sums of some rows.

        Args:
            graphdef: the model's structure, from `transformer.build`.
            params: all of its parameters.
            borrowed: arrays of other models, by name.
            batch: the rows.
            keys_B: a dropout key per row; None drops nothing.
        """
        ...

    def validate(self, graphdef: nnx.GraphDef, params: Any, borrowed: Any, batch: Batch) -> Sum:
        """What is compared between steps of a run and called its validation loss.

        It is a sum and its weight, float32 scalars; batches are added up, and divided once. In nats
        and tokens, where perplexity and bits per byte are to mean something.
        """
        ...
