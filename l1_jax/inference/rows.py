"""Rows of tokens as pure functions: what the programs of an engine compute.

Legend: B rows, R some of them, T new tokens of a row, S slots of a row, V vocabulary (padded), N
steps of one call, C candidates.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from l1_jax.inference.sampling import LOWEST, Sampling, sample
from l1_jax.model.attention import Cache, empty_cache
from l1_jax.model.transformer import LanguageModel

# The most tokens that one call adds to a row, before the host sees them.
MOST_STEPS = 8


class State(NamedTuple):
    """Rows of tokens. All tokens of a row but its last have gone through the model.

    So a row says all of itself: it is continued, copied and cut back without the host's knowing its
    tokens. What lies behind its end means nothing, and is written over.

    Attributes:
        tokens: int32 `[B, S]`.
        lengths: int32 `[B]`, tokens of each row; 0 is a free one.
        seen: bool `[B, V]`, the tokens of each row, for the repetition penalty. Those that end a
            text do not count, or a text after several others would not end.
        cache: keys and values of each layer, the rows first.
    """

    tokens: jax.Array
    lengths: jax.Array
    seen: jax.Array
    cache: list[Cache]


class StepOutput(NamedTuple):
    """What a step gives of each row; of a row that was not active it means nothing.

    Log-probabilities are the model's own: of all tokens, before penalty, temperature, filters and
    mask. They are None where they are not asked for.

    Attributes:
        tokens: int32 `[B]`, drawn.
        logprobs: float32 `[B]`, of these.
        top_tokens: int32 `[B, C]`, the likeliest, in descending order.
        top_logprobs: float32 `[B, C]`, of these.
    """

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


class Decoded(NamedTuple):
    """What several steps give of each row.

    Attributes:
        steps: as of one step, with a dimension N after the rows.
        counts: int32 `[B]`, of how many steps a row has something there.
        ended: bool `[B]`; the last token of the row ends the text.
    """

    steps: StepOutput
    counts: jax.Array
    ended: jax.Array


@dataclasses.dataclass(frozen=True)
class Programs:
    """The functions behind the methods of `Engine`, where their arguments are described.

    Attributes:
        graphdef: the model's structure; its parameters are an argument.
        end_ids: tokens that end a text.
    """

    graphdef: nnx.GraphDef
    end_ids: tuple[int, ...]

    def is_end(self, tokens: jax.Array) -> jax.Array:
        return jnp.isin(tokens, jnp.array(self.end_ids, jnp.int32))

    def empty(self, params: Any, num_rows: int, num_slots: int) -> State:
        model = nnx.merge(self.graphdef, params)
        vocab = model.config.padded_vocab_size
        return State(
            tokens=jnp.zeros((num_rows, num_slots), jnp.int32),
            lengths=jnp.zeros(num_rows, jnp.int32),
            seen=jnp.zeros((num_rows, vocab), bool),
            cache=empty_cache(model.config, num_rows, num_slots, model.dtype),
        )

    def prefill(
        self,
        params: Any,
        state: State,
        tokens_RT: jax.Array,
        counts_R: jax.Array,
        rows_R: jax.Array | None,
    ) -> State:
        model = nnx.merge(self.graphdef, params)
        num_rows, num_slots = state.tokens.shape
        rows = jnp.arange(num_rows) if rows_R is None else rows_R
        numbers_1T = jnp.arange(tokens_RT.shape[1])[None]

        # The tokens go behind the row's; a slot out of range is dropped.
        old_lengths_R1 = state.lengths[rows][:, None]
        lengths_R1 = old_lengths_R1 + counts_R[:, None]
        is_new_RT = numbers_1T < counts_R[:, None]
        slots_RT = jnp.where(is_new_RT, old_lengths_R1 + numbers_1T, num_slots)
        tokens_BS = state.tokens.at[rows[:, None], slots_RT].set(tokens_RT, mode="drop")

        counted_RT = is_new_RT & ~self.is_end(tokens_RT)
        seen_BV = state.seen.at[rows[:, None], tokens_RT].max(counted_RT)

        # What was the row's last token goes through the model now, and its new last one not yet.
        positions_RT = jnp.maximum(old_lengths_R1 - 1, 0) + numbers_1T
        inputs_RT = tokens_BS[rows[:, None], jnp.minimum(positions_RT, num_slots - 1)]
        positions_RT = jnp.where(positions_RT < lengths_R1 - 1, positions_RT, num_slots)

        # Of all rows the cache is written where it lies.
        cache = state.cache
        if rows_R is not None:
            cache = jax.tree.map(lambda leaf: leaf[rows], cache)
        output = model(inputs_RT, positions_RT, cache=cache)
        assert output.cache is not None, "one was given"
        cache = output.cache
        if rows_R is not None:
            cache = jax.tree.map(lambda whole, part: whole.at[rows].set(part), state.cache, cache)

        lengths_B = state.lengths.at[rows].set(lengths_R1[:, 0])
        return State(tokens_BS, lengths_B, seen_BV, cache)

    def copy(self, state: State, sources_R: jax.Array, targets_R: jax.Array) -> State:
        return jax.tree.map(lambda leaf: leaf.at[targets_R].set(leaf[sources_R]), state)

    def cut(self, state: State, rows_R: jax.Array, lengths_R: jax.Array) -> State:
        num_slots = state.tokens.shape[1]
        lengths_R = jnp.minimum(lengths_R, state.lengths[rows_R])

        tokens_RS = state.tokens[rows_R]
        is_kept_RS = jnp.arange(num_slots)[None] < lengths_R[:, None]
        counted_RS = is_kept_RS & ~self.is_end(tokens_RS)
        numbers_R1 = jnp.arange(len(rows_R))[:, None]
        seen_RV = jnp.zeros_like(state.seen[rows_R]).at[numbers_R1, tokens_RS].max(counted_RS)

        return state._replace(
            lengths=state.lengths.at[rows_R].set(lengths_R), seen=state.seen.at[rows_R].set(seen_RV)
        )

    def step(
        self,
        params: Any,
        state: State,
        active_B: jax.Array,
        sampling: Sampling,
        mask_BV: jax.Array | None,
        num_top: int | None,
    ) -> tuple[State, StepOutput]:
        model = nnx.merge(self.graphdef, params)
        return self._add_token(model, state, active_B, sampling, mask_BV, num_top)

    def decode(
        self,
        params: Any,
        state: State,
        active_B: jax.Array,
        sampling: Sampling,
        num_steps: jax.Array,
        num_top: int | None,
    ) -> tuple[State, Decoded]:
        model = nnx.merge(self.graphdef, params)

        def add_token(state: State, active_B: jax.Array) -> tuple[State, StepOutput]:
            return self._add_token(model, state, active_B, sampling, None, num_top)

        def turn(loop: _Loop) -> _Loop:
            state, output = add_token(loop.state, loop.active)
            steps = jax.tree.map(
                lambda all_, new: all_.at[:, loop.num_done].set(new), loop.steps, output
            )
            return _Loop(
                num_done=loop.num_done + 1,
                state=state,
                active=loop.active & ~self.is_end(output.tokens),
                counts=loop.counts + loop.active,
                steps=steps,
            )

        def goes_on(loop: _Loop) -> jax.Array:
            return (loop.num_done < num_steps) & loop.active.any()

        _, one_step = jax.eval_shape(add_token, state, active_B)
        steps = jax.tree.map(
            lambda leaf: jnp.zeros((leaf.shape[0], MOST_STEPS, *leaf.shape[1:]), leaf.dtype),
            one_step,
        )
        counts = jnp.zeros_like(state.lengths)
        loop = _Loop(jnp.int32(0), state, active_B, counts, steps)
        loop = jax.lax.while_loop(goes_on, turn, loop)
        return loop.state, Decoded(loop.steps, loop.counts, ended=active_B & ~loop.active)

    def _add_token(
        self,
        model: LanguageModel,
        state: State,
        active_B: jax.Array,
        sampling: Sampling,
        mask_BV: jax.Array | None,
        num_top: int | None,
    ) -> tuple[State, StepOutput]:
        """A token more in every active row."""
        num_rows, num_slots = state.tokens.shape
        rows = jnp.arange(num_rows)

        last_B = jnp.maximum(state.lengths - 1, 0)
        output = model(state.tokens[rows, last_B][:, None], last_B[:, None], cache=state.cache)
        assert output.cache is not None, "one was given"
        logits_BV = model.logits(output.hidden)[:, 0]

        # No row waits for a sort or a draw of one that is at rest.
        temperature_B = jnp.where(active_B, sampling.temperature, 0.0)
        sampling = sampling._replace(temperature=temperature_B)
        allowed_BV = logits_BV if mask_BV is None else jnp.where(mask_BV, logits_BV, LOWEST)
        tokens_B = sample(allowed_BV, state.seen, sampling, last_B)

        # Out of range is dropped: a row at rest gets no token.
        slots_B = jnp.where(active_B, state.lengths, num_slots)
        is_counted_B = active_B & ~self.is_end(tokens_B)
        is_drawn_BV = jnp.arange(logits_BV.shape[-1])[None] == tokens_B[:, None]

        new_state = State(
            tokens=state.tokens.at[rows, slots_B].set(tokens_B, mode="drop"),
            lengths=state.lengths + active_B,
            seen=state.seen | (is_drawn_BV & is_counted_B[:, None]),
            cache=output.cache,
        )
        return new_state, _look_up(logits_BV, tokens_B, num_top)


class _Loop(NamedTuple):
    """What goes from step to step of `Programs.decode`."""

    num_done: jax.Array  # int32, of the steps
    state: State
    active: jax.Array  # bool [B]
    counts: jax.Array  # int32 [B]
    steps: StepOutput


def _look_up(logits_BV: jax.Array, tokens_B: jax.Array, num_top: int | None) -> StepOutput:
    """The output of a step: its tokens, and what was asked for of their log-probabilities."""
    if num_top is None:
        return StepOutput(tokens_B)

    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    logprobs_B1 = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=-1)
    top_logprobs_BC, top_tokens_BC = jax.lax.top_k(logprobs_BV, num_top)
    return StepOutput(tokens_B, logprobs_B1[:, 0], top_tokens_BC, top_logprobs_BC)
