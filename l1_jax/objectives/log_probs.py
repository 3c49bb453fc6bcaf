"""What heads predict at each position, without the logits of all: log-probabilities, the KL of two.

Unlike the sum of `cross_entropy`, what this gives can be differentiated through, so that any loss
can be made of it. The backward pass makes the logits of each part again.

Legend: B batch, T length, D model width, V vocabulary (padded), K ids a position.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import LanguageModel, mask_padding, project, soften
from l1_jax.objectives.chunks import over_chunks, project_gradients, spread_table


class Prediction(NamedTuple):
    """Distributions over the vocabulary, by what they are made of."""

    model: LanguageModel  # whose head is used
    hidden: jax.Array  # [B, T, D] after its final norm


def token_log_probs(
    model: LanguageModel, x_BTD: jax.Array, ids_BTK: jax.Array, num_chunks: int = 1
) -> jax.Array:
    """log p of some tokens at each position, in nats, float32 `[B, T, K]`.

    Gradients are of x and of the model's head.

    Args:
        model: whose head is used.
        x_BTD: hidden states after the final norm.
        ids_BTK: int32, the tokens that are asked for; with K = 1 the targets, for example.
        num_chunks: into how many parts the length is cut, see `fit_chunks`.
    """

    def log_probs(products: Sequence[jax.Array], ids_BTK: jax.Array) -> jax.Array:
        logits_BTV = _logits(model.config, products[0])
        log_sums_BT1 = jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
        return jnp.take_along_axis(logits_BTV, ids_BTK, axis=-1) - log_sums_BT1

    heads = (_Head(x_BTD, spread_table(model)),)
    return _at_each_position(log_probs, num_chunks, heads, (ids_BTK,))


def kl_of_heads(
    p: Prediction, q: Prediction, num_chunks: int = 1, temperature: float = 1.0
) -> jax.Array:
    """KL(p || q) over the vocabulary at each position, in nats, float32 `[B, T]`.

    Gradients are of both hidden states and both heads; `jax.lax.stop_gradient` of a teacher's
    arrays saves the work for them.

    Args:
        p: the distributions by which the mean is taken, a teacher's for example.
        q: those that are compared with them, of the same vocabulary; the width may be another.
        num_chunks: into how many parts the length is cut, see `fit_chunks`; there are the logits
            of two.
        temperature: by which the logits of both are divided. The slope of the KL gets smaller by
            its square, which is for the caller to make up for.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2, of the temperature.
    """
    configs = (p.model.config, q.model.config)
    assert configs[0].vocab_size == configs[1].vocab_size, "both predict the same tokens"

    def kl(products: Sequence[jax.Array]) -> jax.Array:
        log_p_BTV, log_q_BTV = (
            jax.nn.log_softmax(_logits(config, of_head, temperature))
            for config, of_head in zip(configs, products, strict=True)
        )
        return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)

    heads = tuple(_Head(one.hidden, spread_table(one.model)) for one in (p, q))
    return _at_each_position(kl, num_chunks, heads, ())


class _Head(NamedTuple):
    """What is multiplied: hidden states `[B, T, D]`, and a table of `spread_table`."""

    x: jax.Array
    table: jax.Array


def _logits(config: ModelConfig, products_BTV: jax.Array, temperature: float = 1.0) -> jax.Array:
    """The logits of a model, of the products of its hidden states and its table.

    Those of the padding are the lowest float32 at any temperature, and not -inf: a probability of 0
    times the difference of two of them is 0.
    """
    logits_BTV = soften(products_BTV, config.logit_softcap) / temperature
    return mask_padding(logits_BTV, config.vocab_size)


# Of the products of all heads, and of other arrays, what is wanted at each position.
_Function = Callable[..., jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_each_position(
    function: _Function, num_chunks: int, heads: tuple[_Head, ...], others: Any
) -> jax.Array:
    """`function(products of the heads, *others)`, part by part, `[B, T, ...]`.

    Args:
        function: looks at each position by itself. It is called with products float32
            `[B, part, V]` of each head, and a part of the others.
        num_chunks: of the length.
        heads: with gradients.
        others: a tuple of integers `[B, T, ...]`, which have none.
    """

    def add(_: None, chunk: Any) -> tuple[None, jax.Array]:
        hidden, others = chunk
        return None, function(_products(heads, hidden), *others)

    _, values = over_chunks(add, None, num_chunks, (_hidden(heads), others))
    return values


def _forward(function, num_chunks, heads, others):
    """Keeps nothing but what it was given."""
    return _at_each_position(function, num_chunks, heads, others), (heads, others)


def _backward(function, num_chunks, residuals, d_values):
    """The gradients of the heads, with the logits of each part made again."""
    heads, others = residuals

    def add(d_tables, chunk):
        hidden, others, d_values = chunk

        def of_products(products):
            return function(products, *others)

        _, pull = jax.vjp(of_products, _products(heads, hidden))
        (d_products,) = pull(d_values)

        # In the compute type, as all products of a backward pass.
        d_hidden, d_tables_of_chunk = zip(
            *(
                project_gradients(x, head.table, d.astype(x.dtype))
                for head, x, d in zip(heads, hidden, d_products, strict=True)
            ),
            strict=True,
        )
        return jax.tree.map(jnp.add, d_tables, d_tables_of_chunk), d_hidden

    # The tables' gradients lie as `project_gradients` makes them.
    start = tuple(jnp.zeros_like(head.table.swapaxes(-1, -2)) for head in heads)
    arrays = (_hidden(heads), others, d_values)
    d_tables, d_hidden = over_chunks(add, start, num_chunks, arrays)

    d_heads = tuple(
        _Head(d_x, d_table.swapaxes(-1, -2))
        for d_x, d_table in zip(d_hidden, d_tables, strict=True)
    )
    return d_heads, None


_at_each_position.defvjp(_forward, _backward)


def _hidden(heads: Sequence[_Head]) -> tuple[jax.Array, ...]:
    return tuple(head.x for head in heads)


def _products(heads: Sequence[_Head], hidden: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Of a part of the hidden states."""
    return tuple(project(x, head.table) for head, x in zip(heads, hidden, strict=True))
