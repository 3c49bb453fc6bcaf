"""What the layers of a model share beside their parameters, and what a model gives.

Legend: B batch, T length, D model width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from l1_jax.model.dropout import fold_in
from l1_jax.parallel.layout import zigzag

# Cosines and sines, float32 [B, T, 1, H/2] each; B may be 1.
Rotation = tuple[jax.Array, jax.Array]

# The uses of a layer's dropout keys.
OF_WEIGHTS = 0
OF_ATTENTION = 1
OF_MLP = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers take beside x. The rows of its arrays go with those of x.

    Attributes:
        segment_ids: int32 `[B, T]`; attention stays among equal ones. None: all is one document.
        dropout_keys: `[B]`, a key for each row; None drops nothing.
        rotation: turns queries and keys; None where positions are learned.
        slots: int32 `[B, T]`, where in the cache x is written; None without one.
        num_length_parts: into how many parts devices divide the sequence.
    """

    segment_ids: jax.Array | None = None
    dropout_keys: jax.Array | None = None
    rotation: Rotation | None = None
    slots: jax.Array | None = None
    num_length_parts: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def dims(self) -> Any:
        """The names of its arrays' dimensions, in their places."""

        def named(x: jax.Array | None, *names: str | None) -> Any:
            return None if x is None else names

        turned = ("batch", "length", None, None)
        names: dict[str, Any] = {
            "segment_ids": named(self.segment_ids, "batch", "length"),
            "dropout_keys": named(self.dropout_keys, "batch"),
            "rotation": self.rotation and (turned, turned),
            "slots": named(self.slots, "batch", "length"),
        }
        return dataclasses.replace(self, **names)

    def order(self, length: int) -> np.ndarray:
        """The order in which the positions of a row lie, see `zigzag`."""
        return zigzag(length, self.num_length_parts)

    def keys(self, use: int) -> jax.Array | None:
        """Keys for one use: masks of two uses in a layer must not be the same."""
        return fold_in(self.dropout_keys, use)

    def of_layer(self, number: jax.Array) -> "Context":
        """The context of one layer, whose masks are its own."""
        return dataclasses.replace(self, dropout_keys=fold_in(self.dropout_keys, number))


class Sum(NamedTuple):
    """A term that is added up over layers, rows, microbatches and devices, and divided once.

    A layer gives both float32 `[B]`, of each row by itself; a model both as scalars. The slope of a
    total is to be finite where x is 0: on that idle stages of a pipeline work.
    """

    total: jax.Array
    weight: jax.Array


Sums = dict[str, Sum]


class Output(NamedTuple):
    """What a model gives.

    Attributes:
        hidden: `[B, T, D]` after the final norm, in the compute type.
        cache: keys and values of each layer with x written in; None without a cache.
        sums: what its layers add to an objective, by name.
        taps: `[B, T, D]` after each of the layers that were asked for, in their order.
    """

    hidden: jax.Array
    cache: list[Any] | None
    sums: Sums
    taps: tuple[jax.Array, ...]
