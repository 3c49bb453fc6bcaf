"""A block of the transformer: attention and an MLP, each after a norm.

Legend: B batch, T length, D model width.
"""

from flax import nnx

from l1_jax.model.attention import Attention
from l1_jax.model.dropout import fold_in
from l1_jax.model.layers import MLP, make_norm
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.sharding import constrain


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, attention: str):
        self.attention_norm = make_norm(config)
        self.attention = Attention(rngs, config, attention)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(rngs, config)

    def __call__(
        self,
        x_BTD,
        order_T,
        segment_ids_BT=None,
        keys_B=None,
        cache=None,
        positions_BT=None,
        turn=None,
    ):
        """x after the block, and the cache with it written in; see `Attention`."""
        h_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = self.attention(
            h_BTD,
            order_T,
            segment_ids_BT=segment_ids_BT,
            keys_B=keys_B,
            cache=cache,
            positions_BT=positions_BT,
            turn=turn,
        )
        x_BTD = constrain(x_BTD + y_BTD, "batch", "length", None)

        # Attention folds 0 and 1 into the keys; the MLP's mask must be another.
        h_BTD = self.mlp_norm(x_BTD)
        y_BTD = self.mlp(h_BTD, fold_in(keys_B, 2), order_T)
        x_BTD = constrain(x_BTD + y_BTD, "batch", "length", None)
        return x_BTD, cache
