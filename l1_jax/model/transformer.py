"""The language model: embeddings, a stack of pre-norm blocks, a tied head.

NNX defines it; training and inference run it as pure functions of a nested dict of arrays (`build`).

Legend: B batch, T length, S cache length, D model width, V vocabulary (padded), L layers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from l1_jax.config import ModelConfig
from l1_jax.model.attention import Attention, Cache, causal_mask
from l1_jax.model.layers import MLP, LayerNorm, dropout, fold_in, normal_param
from l1_jax.parallel.sharding import constrain

REMAT_POLICIES = {
    "full": None,  # keep the block's input alone
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Source: Radford et al. 2019 (GPT-2), section 2.3."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        self.attention_norm = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attention = Attention(rngs, config)
        self.mlp_norm = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(rngs, config)

    def __call__(self, x_BTD, mask, keys_B=None, cache=None, positions_BT=None):
        y_BTD, cache = self.attention(self.attention_norm(x_BTD), mask, keys_B, cache, positions_BT)
        x_BTD = constrain(x_BTD + y_BTD, "batch", None, None)
        y_BTD = self.mlp(self.mlp_norm(x_BTD), fold_in(keys_B, 2))
        return constrain(x_BTD + y_BTD, "batch", None, None), cache


class LanguageModel(nnx.Module):
    """A decoder-only transformer. `config.vocab_size` is exact here, the tokenizer's; `dtype` is of the computation;
    `remat` is what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32, remat: str = "none"):
        self.config, self.dtype, self.remat = config, dtype, remat
        stddev, width = config.initializer_range, config.n_embd
        self.token_embedding = normal_param(rngs, {"vocab": config.padded_vocab_size, "embed": width}, stddev)
        self.position_embedding = normal_param(rngs, {"position": config.max_seq_length, "embed": width}, stddev)
        # One block per split of the random stream, its parameters stacked over the layers.
        self.blocks = nnx.split_rngs(splits=config.n_layers)(nnx.vmap(lambda rngs: Block(rngs, config)))(rngs)
        self.final_norm = LayerNorm(width, config.layer_norm_epsilon)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, `[B, T, D]` in the compute type, and the cache with x written to it.

        Args:
            tokens_BT: int32.
            positions_BT: int32; None counts from 0.
            segment_ids_BT: int32; attention stays among equal ones. None: all is one document.
            dropout_keys_B: a key per row; None drops nothing.
            cache: keys and values so far, `[L, B, S, N, H]` each; x is written at `positions_BT`.
        """
        order_BT = jnp.arange(tokens_BT.shape[1])[None]
        positions_BT = order_BT if positions_BT is None else positions_BT
        if cache is None:  # by order in the row: positions may restart with each document
            mask = causal_mask(order_BT, tokens_BT.shape[1])
        else:
            mask = causal_mask(positions_BT, cache[0].shape[2])
        if segment_ids_BT is not None:
            mask &= (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
        # Gathered over fsdp first: a lookup in a table sharded both ways makes XLA copy all of it.
        table_VD = constrain(self.token_embedding[...], "vocab", None)
        x_BTD = (table_VD[tokens_BT] + self.position_embedding[...][positions_BT]).astype(self.dtype)
        x_BTD = constrain(x_BTD, "batch", None, None)
        x_BTD = dropout(x_BTD, self.config.dropout, fold_in(dropout_keys_B, self.config.n_layers))
        x_BTD, cache = self._run_blocks(x_BTD, mask, dropout_keys_B, cache, positions_BT)
        return self.final_norm(x_BTD), cache

    def _run_blocks(self, x_BTD, mask, keys_B, cache, positions_BT):
        graphdef, state = nnx.split(self.blocks)
        stacked = (nnx.to_pure_dict(state), jnp.arange(self.config.n_layers), cache)

        def body(x_BTD, layer):
            params, number, layer_cache = layer
            return nnx.merge(graphdef, params)(x_BTD, mask, fold_in(keys_B, number), layer_cache, positions_BT)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.config.scan_layers)
        if self.config.scan_layers:
            return jax.lax.scan(body, x_BTD, stacked)
        caches = []
        for number in range(self.config.n_layers):
            x_BTD, layer_cache = body(x_BTD, jax.tree.map(lambda leaf: leaf[number], stacked))  # noqa: B023, used at once
            caches.append(layer_cache)
        return x_BTD, None if cache is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]`; the padding rows of the vocabulary are the lowest float32, so never likely."""
        table_VD = constrain(self.token_embedding[...], "vocab", None).astype(x_BTD.dtype)
        logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32)
        real_V = jnp.arange(table_VD.shape[0]) < self.config.vocab_size
        return jnp.where(real_V[None, None], constrain(logits_BTV, "batch", None, "vocab"), jnp.finfo(jnp.float32).min)


def build(
    config: ModelConfig, dtype: jnp.dtype = jnp.float32, remat: str = "none"
) -> tuple[nnx.GraphDef, Callable[[jax.Array], dict[str, Any]], dict[str, Any]]:
    """The model's structure, without any array.

    Returns:
        `(graphdef, initialise, axes)`: the static structure for `nnx.merge(graphdef, params)`; a pure function from a
        key to the parameters, a nested dict of float32 arrays; and such a dict of the names of each array's dimensions.
    """

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, nnx.Rngs(params=key), dtype, remat)

    def names(variable: nnx.Variable) -> tuple[str, ...]:
        axes = variable.get_metadata()["axes"]
        return ("layers",) * (len(variable.shape) - len(axes)) + axes

    graphdef, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
    axes = jax.tree.map(names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return graphdef, lambda key: nnx.to_pure_dict(nnx.state(make(key))), nnx.to_pure_dict(axes)


def count_parameters(config: ModelConfig, params: dict[str, Any]) -> int:
    """Parameters of the model, without the padding rows of the vocabulary."""
    padding = params["token_embedding"].shape[0] - config.vocab_size
    return sum(leaf.size for leaf in jax.tree.leaves(params)) - padding * config.n_embd
