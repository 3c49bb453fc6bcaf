"""Text from a prompt: one prefill, then an on-device loop over a static key/value cache.

Legend: B batch, T prompt length (padded), S cache length, V vocabulary (padded).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.config.yaml_file import config_from_text, dump_config
from l1_jax.errors import UserError, nearest
from l1_jax.inference.sampling import sample
from l1_jax.inference.section import GenerationConfig
from l1_jax.inference.text_stream import TextStream
from l1_jax.loading import LoadedModel
from l1_jax.model.attention import Cache, empty_cache
from l1_jax.model.transformer import unstack
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import named
from l1_jax.storage.remote import display_name

DEFAULT_MAX_TOKENS = 100

# Made on the device between two looks of the host, for printing and stop strings.
STREAM_TOKENS = 8

# Lengths are rounded up to it, so that few programs are compiled.
_LENGTH_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    `tokens` counts the new ones, without end-of-text. `finish_reason` is "stop" (end of text or a
    stop string) or "length" (`max_tokens`).
    """

    text: str
    tokens: int
    finish_reason: str


def prefill(graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, length: int) -> list[Cache]:
    """The cache with the prompts in it.

    Slots past a prompt's end are written over later.

    Args:
        graphdef: the model's structure.
        params: its parameters.
        tokens_BT: the prompts, int32, each filled up at its end.
        length: slots of the cache.
    """
    model = nnx.merge(graphdef, params)
    batch, prompt_length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(prompt_length), (batch, prompt_length))

    cache = empty_cache(model.config, batch, length, model.dtype)
    return model(tokens_BT, positions_BT, cache=cache).cache


def decode(
    graphdef: nnx.GraphDef,
    params: Any,
    state: dict[str, Any],
    steps: np.int32,
    seed: np.uint32,
    end_ids: tuple[int, ...],
    how: GenerationConfig,
) -> dict[str, Any]:
    """Adds up to `steps` tokens to every row that is not done.

    A row is done at a token that ends a text. The draw of a row's token depends on the seed, the
    row's number and the token's position.

    Args:
        graphdef: the model's structure.
        params: its parameters.
        state: `tokens` int32 `[B, S]`, `lengths` int32 `[B]`, `done` bool `[B]`, `cache`, and
            `seen` bool `[B, V]` or None.
        steps: at most so many tokens.
        seed: of the draws.
        end_ids: the tokens that end a text.
        how: the settings of sampling.

    Returns:
        The state after them.
    """
    model = nnx.merge(graphdef, params)
    batch, num_slots = state["tokens"].shape
    rows = jnp.arange(batch)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)

    def add_token(carry: tuple[jax.Array, dict[str, Any]]) -> tuple[jax.Array, dict[str, Any]]:
        count, state = carry
        last = state["lengths"] - 1

        # The logits are those of the last token; a prompt's goes through the model once more.
        last_tokens_B1 = state["tokens"][rows, last][:, None]
        output = model(last_tokens_B1, last[:, None], cache=state["cache"])

        keys_B = jax.vmap(jax.random.fold_in)(row_keys, last)
        next_B = sample(model.logits(output.hidden)[:, 0], keys_B, state["seen"], how)
        done = state["done"] | jnp.isin(next_B, np.array(end_ids))

        # Out of range is dropped: a row that is done gets no token.
        slot = jnp.where(done, num_slots, state["lengths"])
        seen = state["seen"]
        if seen is not None:
            seen = seen.at[rows, next_B].max(~done)

        new_state = {
            "tokens": state["tokens"].at[rows, slot].set(next_B, mode="drop"),
            "lengths": state["lengths"] + ~done,
            "done": done,
            "cache": output.cache,
            "seen": seen,
        }
        return count + 1, new_state

    def goes_on(carry: tuple[jax.Array, dict[str, Any]]) -> jax.Array:
        count, state = carry
        return (count < steps) & ~state["done"].all()

    _, state = jax.lax.while_loop(goes_on, add_token, (jnp.int32(0), state))
    return state


class Generator:
    """Generates with one loaded model; compiled programs are kept between calls.

    Args:
        model: of a checkpoint. As an attribute it has its parameters as lists over the layers, in
            arrays of their own.
        donate: the arrays of the model given are deleted; without, both are in memory.

    Raises:
        UserError: the model's mesh divides the sequence or the layers.
    """

    def __init__(self, model: LoadedModel, donate: bool = False):
        layout = Layout.of(model.mesh)
        if layout.context * layout.stages > 1:
            what = (
                "generation does not divide the sequence or the layers (mesh axes context "
                "and pipeline)"
            )
            raise UserError(what, "Use data, fsdp and tensor")
        self._row_parts = layout.rows
        self.context = model.config.model.max_seq_length

        everywhere = named(model.mesh)
        placed_cache = named(model.mesh, "batch", "heads", None, None)
        placed_state = {
            "tokens": everywhere,
            "lengths": everywhere,
            "done": everywhere,
            "seen": everywhere,
            "cache": placed_cache,
        }

        self._prefill = jax.jit(
            functools.partial(prefill, model.graphdef), static_argnums=2, out_shardings=placed_cache
        )
        # The state is donated, so that a token copies no cache.
        self._decode = jax.jit(
            functools.partial(decode, model.graphdef, end_ids=model.tokenizer.end_ids),
            static_argnames="how",
            donate_argnums=1,
            out_shardings=placed_state,
        )
        self.model = dataclasses.replace(model, params=unstack(model.params, donate))

    def __call__(
        self,
        prompts: Sequence[str],
        how: GenerationConfig,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """Completes each prompt.

        A row's text depends on its prompt, its number and the seed, not on its neighbours.

        Args:
            prompts: one or several.
            how: the settings of sampling.
            max_tokens: new tokens per prompt; None is 100, or what the context holds.
            seed: of the draws, from 0 to 2^32 - 1.
            stop: a text ends before the first of these strings.
            on_text: called with (row, new text) as the text comes.

        Raises:
            UserError: a prompt is empty, or it and `max_tokens` do not fit the context.
        """
        if isinstance(stop, str):
            stop = [stop]

        if "" in stop:
            raise UserError("`stop` has an empty text", "Give the texts to stop before")

        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"`seed` is {seed!r}", f"Give a number from 0 to {2**32 - 1}")

        encoded = [self.encode(prompt) for prompt in prompts]
        tokens_left = self._check_length(max(map(len, encoded)), max_tokens)
        texts = [TextStream(self.model.tokenizer.token_bytes, stop) for _ in prompts]

        with jax.set_mesh(self.model.mesh):
            state = self._start(encoded, tokens_left, how)
            lengths = np.array([len(ids) for ids in encoded])

            while any(text.finish_reason is None for text in texts):
                steps = min(STREAM_TOKENS, tokens_left)
                tokens_left -= steps
                state = self._decode(
                    self.model.params, state, np.int32(steps), np.uint32(seed), how=how
                )
                tokens, new_lengths, ended = jax.device_get(
                    (state["tokens"], state["lengths"], state["done"])
                )

                for row, text in enumerate(texts):
                    if text.finish_reason is not None:
                        continue
                    new_tokens = tokens[row, lengths[row] : new_lengths[row]]
                    new_text = _extend(
                        text, new_tokens, is_ended=ended[row], is_full=tokens_left == 0
                    )
                    if on_text:
                        on_text(row, new_text)
                lengths = new_lengths

                # The device does not know of stop strings. Rows that fill up the batch are done.
                done = np.ones(len(ended), bool)
                done[: len(texts)] = [text.finish_reason is not None for text in texts]
                state["done"] = jax.device_put(done, named(self.model.mesh))

        return [Completion(text.text, text.num_tokens, str(text.finish_reason)) for text in texts]

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens.

        They follow the tokenizer's beginning, where it has one. Else they follow end-of-text where
        the model has only ever seen documents from their start.
        """
        if not prompt:
            raise UserError("the prompt is empty", "Give at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "the prompt is not valid UTF-8", "Check the terminal's encoding"
            ) from error

        tokenizer = self.model.tokenizer
        tokens = tokenizer.encode(prompt)

        if tokenizer.beginning_id is not None:
            return [tokenizer.beginning_id, *tokens]
        if self.model.config.data.document_mask:
            return [tokenizer.eot_id, *tokens]
        return tokens

    def _check_length(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens may be new, after a prompt of so many; UserError where none fits."""
        room = self.context - prompt_tokens
        if room < 1:
            what = (
                f"the prompt has {prompt_tokens} tokens, and the model's context is {self.context}"
            )
            raise UserError(what, f"Shorten the prompt to {self.context - 1} tokens or fewer")

        if max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise UserError(f"`max_tokens` is {max_tokens}", "Give 1 or more")
        if max_tokens > room:
            what = (
                f"the prompt's {prompt_tokens} tokens and `max_tokens` {max_tokens} exceed the "
                f"context of {self.context}"
            )
            raise UserError(what, f"Set `max_tokens` to {room} or less")
        return max_tokens

    def _start(
        self, encoded: list[list[int]], max_tokens: int, how: GenerationConfig
    ) -> dict[str, Any]:
        """The state of `decode` with the prompts in it."""
        count = len(encoded)
        lengths = [len(ids) for ids in encoded]
        prompt_length = self._rounded_up(max(lengths))
        num_slots = self._rounded_up(max(lengths) + max_tokens)

        # Rows divide over the devices; those that fill up the batch are done from the start.
        batch = -(-count // self._row_parts) * self._row_parts
        lengths += [1] * (batch - count)

        vocab = self.model.params["token_embedding"].shape[0]
        tokens = np.zeros((batch, num_slots), np.int32)
        seen = np.zeros((batch, vocab), bool)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
            seen[row, ids] = True
        # `encode` may have put one there, and never the user.
        seen[:, self.model.tokenizer.special_ids] = False

        state = {
            "tokens": tokens,
            "lengths": np.array(lengths, np.int32),
            "done": np.arange(batch) >= count,
            "seen": seen if how.repetition_penalty != 1.0 else None,
        }
        placed = jax.device_put(state, named(self.model.mesh))

        prompts_BT = placed["tokens"][:, :prompt_length]
        placed["cache"] = self._prefill(self.model.params, prompts_BT, num_slots)
        return placed

    def _rounded_up(self, length: int) -> int:
        """A length that is not smaller, of the few for which programs are compiled."""
        multiple = -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        return min(multiple, self.context)


def _extend(text: TextStream, tokens: np.ndarray, *, is_ended: bool, is_full: bool) -> str:
    """Adds a row's new tokens to its text; returns what is new of it.

    Args:
        text: of the row.
        tokens: those that are new.
        is_ended: end-of-text came after them.
        is_full: no more will be made.
    """
    new_text = text.add(tokens)
    if text.finish_reason is not None:  # by a stop string
        return new_text

    if is_ended:
        new_text += text.end("stop")
    elif is_full:
        new_text += text.end("length")
    return new_text


def choose_generation(model: LoadedModel, given: Mapping[str, float | None]) -> GenerationConfig:
    """The checkpoint's `generation` section, with what is given over it, checked as a config is.

    Args:
        model: the checkpoint's.
        given: values by the names of that section's keys; None leaves the checkpoint's value.

    Raises:
        UserError: one of them is not allowed.
    """
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in given:
        if name not in known:
            what = f"`{name}` is no setting of sampling{nearest(name, known)}"
            raise UserError(what, f"The settings are {', '.join(known)}")

    chosen = {name: value for name, value in given.items() if value is not None}
    overrides = [f"generation.{name}={value}" for name, value in chosen.items()]
    written = dump_config(model.config)

    try:
        config = config_from_text(written, display_name(model.path), overrides, of_a_run=True)
    except UserError as error:
        raise _of_arguments(error, chosen) from None

    return config.generation


def _of_arguments(error: UserError, given: Mapping[str, float]) -> UserError:
    """An error of overrides as one of the arguments that they were made of."""
    lines = error.details or [str(error)]

    def shorten(line: str) -> str:
        for name, value in given.items():
            line = line.removeprefix(f"override generation.{name}={value}: ")
            line = line.replace(f"generation.{name} ", f"`{name}` ")
        return line

    whats = [shorten(line).rstrip(".") for line in lines]
    what, _, remedy = whats[0].rpartition(". ")
    return UserError(what, remedy, [f"{what}." for what in whats[1:]])


def generate(
    model: LoadedModel,
    prompts: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    **sampling: float | None,
) -> list[Completion]:
    """Completes prompts.

    For many calls with one model make a `Generator`, which keeps what it compiles.

    Args:
        model: from `l1_jax.load`.
        prompts: one, or several.
        max_tokens: new ones per prompt; None is 100, or what the context holds.
        seed: of the draws.
        stop: texts before which a completion ends.
        sampling: keys of the `generation` section, as temperature, instead of the checkpoint's.

    Raises:
        UserError: a prompt or a setting cannot be used.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    how = choose_generation(model, sampling)
    return Generator(model)(list(prompts), how, max_tokens=max_tokens, seed=seed, stop=stop)
