"""How many parameters and floating-point operations a model has."""

from typing import Any, NamedTuple

import jax

from l1_jax.model.section import ModelConfig
from l1_jax.model.stack import BLOCKS, groups_of


def count_parameters(config: ModelConfig, params: dict[str, Any]) -> int:
    """Parameters of the model, without the padding rows of the vocabulary.

    Args:
        config: its `vocab_size` is the tokenizer's.
        params: arrays or their shapes.
    """
    # With tied embeddings there is no head of its own.
    tables = [params[name] for name in ("token_embedding", "head") if name in params]
    padding_rows = sum(table.shape[0] - config.vocab_size for table in tables)

    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return total - padding_rows * config.n_embd


class Frozen(NamedTuple):
    """What of a model is not trained."""

    parameters: int = 0
    layers: int = 0  # the first ones, before which nothing is trained: no gradient reaches them
    parameters_of_layers: int = 0  # of those layers


NOTHING = Frozen()


def count_frozen(model: ModelConfig, trained: dict[str, Any], held: dict[str, Any]) -> Frozen:
    """What is frozen, by the trained and the held parameters: arrays or their shapes."""
    layers = _leading_layers(model, trained, held)

    # The groups of the stack that are held whole have an equal share of it each layer.
    of_layers = 0
    if layers:
        stacks = [tree[BLOCKS] for tree in (trained, held) if BLOCKS in tree]
        in_all_layers = sum(leaf.size for leaf in jax.tree.leaves(stacks))
        of_layers = in_all_layers * layers // model.n_layers

    # A table that tokens are only looked up in multiplies nothing, see `flops_per_token`.
    multiplied = dict(held)
    if not model.tie_embeddings:
        multiplied.pop("token_embedding", None)

    return Frozen(
        parameters=count_parameters(model, multiplied),
        layers=layers,
        parameters_of_layers=of_layers,
    )


def _leading_layers(model: ModelConfig, trained: dict[str, Any], held: dict[str, Any]) -> int:
    """How many layers come before the first parameter that is trained."""
    # The gradient of an embedding goes through all layers.
    if not held or "token_embedding" in trained or "position_embedding" in trained:
        return 0

    if BLOCKS not in trained:
        return model.n_layers

    groups = groups_of(trained[BLOCKS])
    return groups[0].first if groups else 0


def flops_per_token(num_parameters: int, model: ModelConfig, frozen: Frozen = NOTHING) -> int:
    """Floating-point operations of a training step, a token.

    They are 6 N + 12 L D T, with N parameters, L layers, D the width of all heads, T context. Of
    these 2 N + 4 L D T are the forward pass; a frozen parameter has no gradient of its own, and the
    first layers, if all before and in them is frozen, have no backward pass.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    # Of tables that are not tied, the one that tokens are looked up in multiplies nothing, and is
    # not in N.
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.n_embd
    multiplied = num_parameters - lookup

    heads_width = model.n_heads * model.head_dims
    attention = heads_width * model.max_seq_length  # of a layer
    whole = 6 * multiplied + 12 * model.n_layers * attention

    own_gradients = 2 * frozen.parameters
    gradients_of_inputs = 2 * frozen.parameters_of_layers + 8 * frozen.layers * attention
    return whole - own_gradients - gradients_of_inputs
