"""How many parameters and floating-point operations a model has."""

from typing import Any

import jax

from l1_jax.model.packed import is_packed
from l1_jax.model.section import ModelConfig


def count_parameters(config: ModelConfig, params: dict[str, Any]) -> int:
    """Parameters of the model, without the padding rows of the vocabulary.

    Args:
        config: its `vocab_size` is the tokenizer's.
        params: arrays or their shapes. A packed weight counts as what it stands for.
    """
    # With tied embeddings there is no head of its own.
    tables = [params[name] for name in ("token_embedding", "head") if name in params]
    padding_rows = sum(table.shape[0] - config.vocab_size for table in tables)

    total = sum(leaf.size for leaf in jax.tree.leaves(params, is_leaf=is_packed))
    return total - padding_rows * config.n_embd


def flops_per_token(num_parameters: int, model: ModelConfig) -> int:
    """Floating-point operations of a training step, a token.

    They are 6 N + 12 L D T, with N parameters, L layers, D the width of all heads, T context.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """
    # Of tables that are not tied, the one that tokens are looked up in multiplies nothing, and is
    # not in N.
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.n_embd
    multiplied = num_parameters - lookup

    heads_width = model.n_heads * model.head_dims
    attention = model.n_layers * heads_width * model.max_seq_length
    return 6 * multiplied + 12 * attention
