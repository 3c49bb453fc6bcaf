"""A block of the transformer: attention and an MLP, each after a norm.

Legend: B batch, T length, D model width.
"""

from typing import Any

import jax
from flax import nnx

from l1_jax.model.attention import Attention, Cache
from l1_jax.model.context import Context, Sums
from l1_jax.model.layers import MLP, make_norm
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain

# The second part of a block, by `model.activation`: made of (rngs, config), called with (x,
# context), it gives what is added to x and its `Sums`.
MLPS: dict[str, Any] = {"gelu": MLP, "relu_squared": MLP, "swiglu": MLP}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, attention: str):
        self.attention_norm = make_norm(config)
        self.attention = Attention(rngs, config, attention)
        self.mlp_norm = make_norm(config)
        self.mlp = MLPS[config.activation](rngs, config)

    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None, Sums]:
        """x after the block, the cache with x written in, and what its parts add to an objective,
        row by row."""
        h_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = self.attention(h_BTD, context, cache)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "length", None)

        h_BTD = self.mlp_norm(x_BTD)
        y_BTD, sums = self.mlp(h_BTD, context)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "length", None)
        return x_BTD, cache, sums
