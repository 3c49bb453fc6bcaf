"""The language model: embeddings, a stack of pre-norm blocks, a head.

NNX defines it; training and inference run it as pure functions of a nested dict of arrays
(`build`).

Legend: B batch, T length, S cache length, K key/value heads, H head size, D model width, V
vocabulary (padded), L layers, R and C parts of the rows and of the length.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from l1_jax.model.attend import ATTENTION
from l1_jax.model.attention import Cache
from l1_jax.model.block import Block
from l1_jax.model.dropout import dropout, fold_in
from l1_jax.model.layers import LINEAR, einsum_float32, make_norm, normal_param, rotation
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.layout import ONE_DEVICE, Layout, zigzag
from l1_jax.parallel.pipeline import run_stages
from l1_jax.parallel.sharding import constrain

# by names, for in a pipeline the products with weights have a batch dimension too: the stages
REMAT_POLICIES = {
    "full": None,  # keep the block's input alone
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.save_only_these_names(LINEAR),
}


class LanguageModel(nnx.Module):
    """A decoder-only transformer; its arguments are those of `build`."""

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
        remat: str,
        layout: Layout,
        attention: str,
    ):
        self.config, self.dtype, self.remat, self.layout = config, dtype, remat, layout
        stddev, width = config.initializer_range, config.n_embd
        self.token_embedding = normal_param(
            rngs, {"vocab": config.padded_vocab_size, "embed": width}, stddev
        )
        if config.position_embedding == "learned":
            self.position_embedding = normal_param(
                rngs, {"position": config.max_seq_length, "embed": width}, stddev
            )
        # One block per split of the random stream, its parameters stacked over the layers.
        make = nnx.vmap(lambda rngs: Block(rngs, config, attention))
        self.blocks = nnx.split_rngs(splits=config.n_layers)(make)(rngs)
        self.final_norm = make_norm(config)
        if not config.tie_embeddings:
            self.head = nnx.Param(
                jnp.zeros((config.padded_vocab_size, width)), axes=("vocab", "embed")
            )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        cache: list[Cache] | None = None,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """Hidden states after the final norm, `[B, T, D]` in the compute type, and the cache with x
        written to it.

        Args:
            tokens_BT: int32. Where the layout divides the sequence, tokens and all else lie in the
                order of `zigzag`.
            positions_BT: int32; None counts from 0.
            segment_ids_BT: int32; attention stays among equal ones. None: all is one document.
            dropout_keys_B: a key per row; None drops nothing.
            cache: keys and values so far, of each layer; x is written at `positions_BT`.
        """
        order_T = zigzag(tokens_BT.shape[1], self.layout.context)
        positions_BT = jnp.asarray(order_T)[None] if positions_BT is None else positions_BT
        x_BTD, turn = constrain(self.token_embedding[...], "vocab", None)[tokens_BT], None
        if self.config.position_embedding == "learned":
            x_BTD += constrain(self.position_embedding[...], "position", None)[positions_BT]
        else:
            theirs = (
                jnp.broadcast_to(positions_BT, tokens_BT.shape)
                if self.layout.stages > 1
                else positions_BT
            )
            turn = rotation(
                theirs, self.config.n_embd // self.config.n_heads, self.config.rope_theta
            )
        x_BTD = constrain(x_BTD.astype(self.dtype), "batch", "length", None)
        x_BTD = dropout(
            x_BTD, self.config.dropout, fold_in(dropout_keys_B, self.config.n_layers), order_T
        )
        graphdef, state = nnx.split(self.blocks)
        layers = (nnx.to_pure_dict(state), jnp.arange(self.config.n_layers))

        def block(x_BTD, layer, inputs):
            (params, number), layer_cache = layer
            segment_ids_BT, keys_B, turn = inputs
            keys_B = fold_in(keys_B, number)
            return nnx.merge(graphdef, params)(
                x_BTD, order_T, segment_ids_BT, keys_B, layer_cache, positions_BT, turn
            )

        def stage(layers, x_BTD, inputs):
            return self._run_layers(block, x_BTD, (layers, None), inputs)[0]

        inputs = (segment_ids_BT, dropout_keys_B, turn)
        if self.layout.stages > 1:
            x_BTD = run_stages(
                stage, layers, x_BTD, inputs, self.layout.stages, self.layout.microbatches
            )
        else:
            x_BTD, cache = self._run_layers(block, x_BTD, (layers, cache), inputs)
        return self.final_norm(x_BTD), cache

    def _run_layers(self, block, x_BTD, layers, inputs):
        """`block(x, layer, inputs)` for each of `layers`; returns x and the cache. Arrays are
        stacked over the layers; a cache is a list of the layers' own, with which parameters may be
        lists too (`unstack`): a loop takes them."""
        if self.remat != "none":
            block = jax.checkpoint(
                block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.config.scan_layers
            )
        (_, numbers), cache = layers
        if self.config.scan_layers and cache is None:
            return jax.lax.scan(lambda x_BTD, layer: block(x_BTD, layer, inputs), x_BTD, layers)
        caches = []
        for number in range(len(numbers)):
            layer = jax.tree.map(
                operator.itemgetter(number), layers, is_leaf=lambda leaf: isinstance(leaf, list)
            )
            x_BTD, layer_cache = block(x_BTD, layer, inputs)
            caches.append(layer_cache)
        return x_BTD, cache and caches

    def table(self) -> jax.Array:
        """The head's weights, float32 `[V, D]`, gathered over fsdp: one sharded both ways makes XLA
        copy all of the result, as it does for the lookup of the token embeddings."""
        head = self.token_embedding if self.config.tie_embeddings else self.head
        return constrain(head[...], "vocab", None)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]`; the padding rows of the vocabulary are the lowest float32, so never
        likely."""
        logits_BTV = soften(project(x_BTD, self.table()), self.config.logit_softcap)
        return mask_padding(logits_BTV, self.config.vocab_size)


def project(x_BTD: jax.Array, table: jax.Array) -> jax.Array:
    """x times the table of the head, float32 `[B, T, V]`. The table is `[V, D]`, or `[R, C, V, D]`:
    one for each of R equal parts of the rows and C of the length."""
    table = table.astype(x_BTD.dtype)
    if table.ndim == 2:
        logits = einsum_float32("BTD,VD->BTV", x_BTD, table)
    else:
        rows, lengths, _, width = table.shape
        x_RBCTD = x_BTD.reshape(
            rows, x_BTD.shape[0] // rows, lengths, x_BTD.shape[1] // lengths, width
        )
        logits = einsum_float32("RBCTD,RCVD->RBCTV", x_RBCTD, table)
    return constrain(logits.reshape(*x_BTD.shape[:2], -1), "batch", "length", "vocab")


def soften(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits between -softcap and softcap. Source: Gemma Team 2024 (Gemma 2), arXiv:2408.00118,
    section 2."""
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def mask_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
    real_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    return jnp.where(real_V[None, None], logits_BTV, jnp.finfo(jnp.float32).min)


def build(
    config: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
    layout: Layout = ONE_DEVICE,
    attention: str = "plain",
) -> tuple[nnx.GraphDef, Callable[[jax.Array], dict[str, Any]], dict[str, Any]]:
    """The model's structure, without any array.

    Args:
        config: its `vocab_size` is exact here, the tokenizer's.
        dtype: of the computation; parameters are float32.
        remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
        layout: of the mesh that it will run on.
        attention: a name from `choose_attention`; a cache is attended to plainly.

    Returns:
        `(graphdef, initialise, axes)`: the static structure for `nnx.merge(graphdef, params)`; a
        pure function from a key to the parameters, a nested dict of float32 arrays; and such a dict
        of the names of each array's dimensions.
    """

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(config, nnx.Rngs(params=key), dtype, remat, layout, attention)

    def names(variable: nnx.Variable) -> tuple[str, ...]:
        axes = variable.get_metadata()["axes"]
        return ("layers",) * (len(variable.shape) - len(axes)) + axes

    graphdef, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
    axes = jax.tree.map(names, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return graphdef, lambda key: nnx.to_pure_dict(nnx.state(make(key))), nnx.to_pure_dict(axes)


def unstack(params: dict[str, Any], donate: bool = False) -> dict[str, Any]:
    """The same parameters with the blocks' arrays as lists of the layers' own. For what reads them
    once a token: XLA copies a layer's slice of a stacked array before it is used. With `donate`
    each stacked array is deleted as soon as it is taken apart, so that memory never holds all of
    them twice."""
    pick = jax.jit(lambda leaf, number: leaf[number])  # one program for all layers

    def take_apart(leaf: jax.Array) -> list[jax.Array]:
        layers = [pick(leaf, number) for number in range(len(leaf))]
        if donate:
            leaf.delete()
        return layers

    return params | {"blocks": jax.tree.map(take_apart, params["blocks"])}
