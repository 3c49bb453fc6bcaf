"""The language model: embeddings, a stack of pre-norm blocks, a head.

NNX defines it; training and inference run it as pure functions of a nested dict of arrays
(`build`).

Legend: B batch, T length, S cache length, K key/value heads, H head size, D model width, V
vocabulary (padded), L layers, R and C parts of the rows and of the length.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from l1_jax.model.attend import ATTENTION
from l1_jax.model.attention import Cache
from l1_jax.model.block import Block
from l1_jax.model.context import Context, Output, Rotation, Sums
from l1_jax.model.dropout import dropout, fold_in
from l1_jax.model.layers import LINEAR, einsum_float32, make_norm, make_rotation, normal_param
from l1_jax.model.packed import (
    NOTHING,
    Packing,
    constrain_weight,
    name_dims,
    pack_params,
    take_rows,
    unpack,
)
from l1_jax.model.section import ModelConfig
from l1_jax.model.stack import Group, split_stack, whole_stack
from l1_jax.parallel.layout import ONE_DEVICE, Layout, zigzag
from l1_jax.parallel.pipeline import run_stages
from l1_jax.parallel.sharding import constrain

# What the backward pass finds kept; it computes the rest again. By names, for in a pipeline the
# products with weights have a batch dimension too: the stages.
REMAT_POLICIES = {
    # The block's input alone.
    "full": None,
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, ATTENTION),
    "dots_no_batch": jax.checkpoint_policies.save_only_these_names(LINEAR),
}


class _Layers(NamedTuple):
    """What each layer has of its own: arrays stacked over the layers, or those of one layer.

    A cache is a list of the layers' own, with which parameters may be lists too (`unstack`).
    """

    params: Any
    number: jax.Array  # int32, counted from 0
    cache: list[Cache] | Cache | None = None


# x, one layer and the context -> x after it, its cache and its sums, row by row.
_Block = Callable[[jax.Array, Any, Context], Any]


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
        groups: Sequence[Group],
    ):
        self.config = config
        self.groups = tuple(groups)
        self.dtype = dtype
        self.remat = remat
        self.layout = layout

        width = config.n_embd
        token_dims = {"vocab": config.padded_vocab_size, "embed": width}
        self.token_embedding = normal_param(
            rngs, token_dims, config.initializer_range, summed=["embed"]
        )
        if config.position_embedding == "learned":
            position_dims = {"position": config.max_seq_length, "embed": width}
            self.position_embedding = normal_param(rngs, position_dims, config.initializer_range)

        # One block per split of the random stream, its parameters stacked over the layers.
        make = nnx.vmap(lambda rngs: Block(rngs, config, attention))

        def stack(num_layers: int) -> Block:
            return nnx.split_rngs(splits=num_layers)(make)(rngs)

        self.blocks: Any
        if len(groups) == 1:
            self.blocks = stack(config.n_layers)
        else:
            parts = {group.name: stack(group.end - group.first) for group in groups}
            self.blocks = nnx.Dict(parts)

        self.final_norm = make_norm(config)
        if not config.tie_embeddings:
            zeros = jnp.zeros(tuple(token_dims.values()))
            self.head = nnx.Param(zeros, axes=tuple(token_dims), summed=("embed",))

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
        cache: list[Cache] | None = None,
        taps: Sequence[int] = (),
    ) -> Output:
        """Hidden states of tokens.

        Args:
            tokens_BT: int32. Where the layout divides the sequence, tokens and all else lie in the
                order of `zigzag`.
            positions_BT: int32; None counts from 0.
            segment_ids_BT: int32; attention stays among equal ones. None: all is one document.
            dropout_keys_B: a key per row; None drops nothing.
            cache: keys and values so far, of each layer; x is written at `positions_BT`.
            taps: numbers of layers after which hidden states are wanted, ascending.
        """
        config = self.config
        order_T = zigzag(tokens_BT.shape[1], self.layout.context)
        if positions_BT is None:
            positions_BT = jnp.asarray(order_T)[None]

        x_BTD = self._embed(tokens_BT, positions_BT)
        rotation = None
        if config.position_embedding == "rope":
            rotation = self._make_rotation(positions_BT, tokens_BT.shape)
        x_BTD = constrain(x_BTD.astype(self.dtype), "batch", "length", None)

        # Layers fold their numbers into the keys; the number after the last is free.
        embedding_keys_B = fold_in(dropout_keys_B, config.n_layers)
        x_BTD = dropout(x_BTD, config.dropout, embedding_keys_B, order_T)

        context = Context(
            segment_ids=segment_ids_BT,
            dropout_keys=dropout_keys_B,
            rotation=rotation,
            slots=None if cache is None else positions_BT,
            num_length_parts=self.layout.context,
        )
        if self.layout.stages > 1:
            assert cache is None, "a pipeline writes no cache"
            assert not taps, "a pipeline gives no hidden states of its stages"
            x_BTD, sums = self._run_pipeline(x_BTD, context)
            tapped: tuple[jax.Array, ...] = ()
        else:
            x_BTD, cache, sums, tapped = self._run_groups(x_BTD, context, cache, taps)

        # What the rows gave, as one.
        sums = jax.tree.map(jnp.sum, sums)
        return Output(self.final_norm(x_BTD), cache, sums, tapped)

    def _embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Token embeddings, and those of positions where they are learned, float32 `[B, T, D]`."""
        token_table_VD = constrain_weight(self.token_embedding.get_value(), "vocab", None)
        x_BTD = take_rows(token_table_VD, tokens_BT)

        if self.config.position_embedding == "learned":
            position_table = constrain(self.position_embedding[...], "position", None)
            x_BTD += position_table[positions_BT]
        return x_BTD

    def _make_rotation(self, positions_BT: jax.Array, shape: tuple[int, ...]) -> Rotation:
        """By how much queries and keys are turned; `shape` is that of the tokens."""
        # A pipeline cuts it into microbatches with the rows of x, so each row needs its own.
        if self.layout.stages > 1:
            positions_BT = jnp.broadcast_to(positions_BT, shape)

        return make_rotation(positions_BT, self.config.head_dims, self.config.rope_theta)

    def _run_pipeline(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
        """x after all layers, in stages, and the sums of their rows."""
        (group,) = self.groups
        block, layers = self._layers_of(group, cache=None)

        def stage(layers: _Layers, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Sums]:
            x_BTD, _, sums = self._run_layers(block, x_BTD, layers, context)
            return x_BTD, sums

        return run_stages(
            stage,
            layers,
            x_BTD,
            context,
            input_dims=context.dims,
            num_stages=self.layout.stages,
            num_microbatches=self.layout.microbatches,
        )

    def _run_groups(
        self, x_BTD: jax.Array, context: Context, cache: list[Cache] | None, taps: Sequence[int]
    ) -> tuple[jax.Array, list[Cache] | None, Sums, tuple[jax.Array, ...]]:
        """x after all layers, their cache, the sums of their rows, and x after those of `taps`."""
        assert list(taps) == sorted(set(taps)), "layers are tapped once each, in their order"
        assert all(0 <= number < self.config.n_layers for number in taps), "there is no such layer"
        caches: list[Cache] = []
        parts = []
        tapped = []

        for group in self.groups:
            block, layers = self._layers_of(group, cache)

            # A group is cut after each of its layers that is tapped.
            ends = [number + 1 for number in taps if group.first <= number < group.end]
            bounds = sorted({group.first, *ends, group.end})

            for first, end in itertools.pairwise(bounds):
                some = layers
                if (first, end) != group:
                    some = _pick_layers(layers, slice(first - group.first, end - group.first))

                x_BTD, new_cache, sums = self._run_layers(block, x_BTD, some, context)
                caches += new_cache or []
                parts.append(sums)

                if end - 1 in taps:
                    tapped.append(x_BTD)

        return x_BTD, None if cache is None else caches, add_trees(parts), tuple(tapped)

    def _layers_of(self, group: Group, cache: list[Cache] | None) -> tuple[_Block, _Layers]:
        """A function that applies one layer of a group, and what each of them has of its own."""
        blocks = self.blocks if len(self.groups) == 1 else self.blocks[group.name]
        graphdef, state = nnx.split(blocks)

        def block(x_BTD: jax.Array, layer: Any, context: Context) -> Any:
            apply = nnx.merge(graphdef, layer.params)
            return apply(x_BTD, context.of_layer(layer.number), layer.cache)

        numbers = jnp.arange(group.first, group.end)
        of_group = None if cache is None else cache[group.first : group.end]
        return block, _Layers(nnx.to_pure_dict(state), numbers, of_group)

    def _run_layers(
        self, block: _Block, x_BTD: jax.Array, layers: _Layers, context: Context
    ) -> tuple[jax.Array, list[Cache] | None, Sums]:
        """x after all of `layers`, their cache, and the sums of their rows.

        Args:
            block: `block(x, layer, context)` is x after one layer, that layer's cache and sums.
            x_BTD: what enters the first.
            layers: one or more.
            context: of all of them.
        """
        if self.remat != "none":
            # XLA would merge what is computed again with the first time, but not out of a scan.
            block = jax.checkpoint(
                block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.config.scan_layers
            )

        if self.config.scan_layers and layers.cache is None:

            def turn(x_BTD: jax.Array, layer: _Layers) -> tuple[jax.Array, Sums]:
                x_BTD, _, sums = block(x_BTD, layer, context)
                return x_BTD, sums

            x_BTD, sums = jax.lax.scan(turn, x_BTD, layers)
            return x_BTD, None, jax.tree.map(lambda of_layers: of_layers.sum(axis=0), sums)

        # A cache, and the parameters that come with it, may be lists: a loop takes them.
        caches = []
        parts = []
        for number in range(len(layers.number)):
            x_BTD, cache, sums = block(x_BTD, _pick_layers(layers, number), context)
            caches.append(cache)
            parts.append(sums)

        return x_BTD, None if layers.cache is None else caches, add_trees(parts)

    def table(self) -> jax.Array:
        """The head's weights, float32 `[V, D]`, gathered over fsdp.

        One sharded both ways makes XLA copy all of the result, as it does for the lookup of the
        token embeddings.
        """
        head = self.token_embedding if self.config.tie_embeddings else self.head
        return unpack(constrain_weight(head.get_value(), "vocab", None), jnp.float32)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The logits of the next token, float32 `[B, T, V]`.

        The padding rows of the vocabulary are the lowest float32, so never likely.
        """
        logits_BTV = project(x_BTD, self.table())
        logits_BTV = soften(logits_BTV, self.config.logit_softcap)
        return mask_padding(logits_BTV, self.config.vocab_size)


def add_trees(trees: Sequence[Any]) -> Any:
    """The sum of trees of one structure."""
    return jax.tree.map(lambda *leaves: functools.reduce(operator.add, leaves), *trees)


def _pick_layers(layers: _Layers, number: int | slice) -> _Layers:
    """One of the layers, or some; of a list its element, of a stacked array its slice."""
    return jax.tree.map(
        operator.itemgetter(number), layers, is_leaf=lambda leaf: isinstance(leaf, list)
    )


def project(x_BTD: jax.Array, table: jax.Array) -> jax.Array:
    """x times the table of the head, float32 `[B, T, V]`.

    Args:
        x_BTD: hidden states after the final norm.
        table: `[V, D]`, or `[R, C, V, D]`: one for each of R equal parts of the rows and C of the
            length.
    """
    batch, length, width = x_BTD.shape
    table = table.astype(x_BTD.dtype)

    if table.ndim == 2:
        logits = einsum_float32("BTD,VD->BTV", x_BTD, table)
    else:
        rows, lengths = table.shape[:2]
        x_RBCTD = x_BTD.reshape(rows, batch // rows, lengths, length // lengths, width)
        logits = einsum_float32("RBCTD,RCVD->RBCTV", x_RBCTD, table)

    logits_BTV = logits.reshape(batch, length, -1)
    return constrain(logits_BTV, "batch", "length", "vocab")


def soften(logits: jax.Array, softcap: float | None) -> jax.Array:
    """Logits between -softcap and softcap; None leaves them.

    Source: Gemma Team 2024 (Gemma 2), arXiv:2408.00118, section 2.
    """
    if not softcap:
        return logits
    return softcap * jnp.tanh(logits / softcap)


def mask_padding(logits_BTV: jax.Array, vocab_size: int) -> jax.Array:
    """The logits, with the lowest float32 for the padding rows of the vocabulary."""
    is_real_V = jnp.arange(logits_BTV.shape[-1]) < vocab_size
    return jnp.where(is_real_V[None, None], logits_BTV, jnp.finfo(jnp.float32).min)


def build(
    config: ModelConfig,
    dtype: jnp.dtype = jnp.float32,
    remat: str = "none",
    layout: Layout = ONE_DEVICE,
    attention: str = "plain",
    groups: Sequence[Group] | None = None,
    packing: Packing = NOTHING,
) -> tuple[nnx.GraphDef, Callable[[jax.Array], dict[str, Any]], dict[str, Any]]:
    """The model's structure, without any array.

    Args:
        config: its `vocab_size` is exact here, the tokenizer's.
        dtype: of the computation; parameters are float32.
        remat: what the backward pass recomputes: `none`, or a name in `REMAT_POLICIES`.
        layout: of the mesh that it will run on.
        attention: a name from `choose_attention`; a cache is attended to plainly.
        groups: of the layers, see `stack`; None is one of all.
        packing: which weights are packed, and how; the structure is the same for all of them.

    Returns:
        `(graphdef, initialise, axes)`: the static structure for `nnx.merge(graphdef, params)`; a
        pure function from a key to the parameters, a nested dict of float32 arrays and `Packed`;
        and such a dict of the names of each array's dimensions.
    """
    one_group = whole_stack(config.n_layers)

    def make(key: jax.Array, groups: Sequence[Group]) -> LanguageModel:
        return LanguageModel(
            config,
            rngs=nnx.Rngs(params=key),
            dtype=dtype,
            remat=remat,
            layout=layout,
            attention=attention,
            groups=groups,
        )

    def initialise(key: jax.Array) -> dict[str, Any]:
        # The same weights, however the layers are grouped.
        whole = nnx.to_pure_dict(nnx.state(make(key, one_group)))
        if packing:
            whole = pack_params(whole, summed_dims(config), packing)
        return split_stack(whole, groups or one_group)

    make_grouped = functools.partial(make, groups=groups or one_group)
    graphdef, state = nnx.split(nnx.eval_shape(make_grouped, jax.random.key(0)))
    axes = _map_variables(_dim_names, state)
    if packing:
        axes = name_dims(axes, jax.eval_shape(initialise, jax.random.key(0)))
    return graphdef, initialise, axes


def summed_dims(config: ModelConfig) -> dict[str, Any]:
    """Of each parameter the dimensions over which a product with it sums, all layers stacked; ()
    of what is no weight of a product."""
    one_group = whole_stack(config.n_layers)

    def make(key: jax.Array) -> LanguageModel:
        return LanguageModel(
            config,
            rngs=nnx.Rngs(params=key),
            dtype=jnp.float32,
            remat="none",
            layout=ONE_DEVICE,
            attention="plain",
            groups=one_group,
        )

    def dims(variable: nnx.Variable) -> tuple[int, ...]:
        summed = variable.get_metadata().get("summed", ())
        return tuple(dim for dim, name in enumerate(_dim_names(variable)) if name in summed)

    return _map_variables(dims, nnx.state(nnx.eval_shape(make, jax.random.key(0))))


def _dim_names(variable: nnx.Variable) -> tuple[str, ...]:
    """The names of a parameter's dimensions; a block does not know that its own are stacked."""
    own = variable.get_metadata()["axes"]
    num_stacked = len(variable.shape) - len(own)
    return ("layers",) * num_stacked + own


def _map_variables(function: Callable[[nnx.Variable], Any], state: Any) -> dict[str, Any]:
    """A nested dict of what `function` makes of each parameter."""
    mapped = jax.tree.map(function, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.to_pure_dict(mapped)


def unstack(params: dict[str, Any], donate: bool = False) -> dict[str, Any]:
    """The same parameters with the blocks' arrays as lists of the layers' own.

    It is for what reads them once a token: XLA copies a layer's slice of a stacked array before it
    is used.

    Args:
        params: of `build`.
        donate: each stacked array is deleted as soon as it is taken apart, so that memory never
            holds all of them twice.
    """
    # One program for all layers.
    pick = jax.jit(lambda leaf, number: leaf[number])

    def take_apart(leaf: jax.Array) -> list[jax.Array]:
        layers = [pick(leaf, number) for number in range(len(leaf))]
        if donate:
            leaf.delete()
        return layers

    return params | {"blocks": jax.tree.map(take_apart, params["blocks"])}
