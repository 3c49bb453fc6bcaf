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
from l1_jax.errors import UserError
from l1_jax.inference.sampling import sample
from l1_jax.inference.section import GenerationConfig
from l1_jax.inference.text_stream import TextStream
from l1_jax.loading import LoadedModel
from l1_jax.model.attention import empty_cache
from l1_jax.model.transformer import unstack
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import named
from l1_jax.storage.remote import display_name

DEFAULT_MAX_TOKENS = 100
STREAM_TOKENS = 8  # made on the device between two looks of the host, for printing and stop strings
_ROUND = 64  # lengths are rounded up to it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt."""

    text: str
    tokens: int  # new ones; end-of-text is not counted
    finish_reason: str  # "stop": end of text or a stop string; "length": max_tokens


def prefill(graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, length: int) -> Any:
    """The cache of `length` slots with the prompts in it. Slots past a prompt's end are written
    over later."""
    model = nnx.merge(graphdef, params)
    batch, prompt = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))
    return model(
        tokens_BT, positions_BT, cache=empty_cache(model.config, batch, length, model.dtype)
    )[1]


def decode(
    graphdef: nnx.GraphDef,
    params: Any,
    state: dict[str, Any],
    steps: np.int32,
    seed: np.uint32,
    eot_id: int,
    how: GenerationConfig,
) -> dict[str, Any]:
    """Adds up to `steps` tokens to every row that is not done; a row is done at its end-of-text
    token.

    `state`: `tokens` int32 `[B, S]`, `lengths` int32 `[B]`, `done` bool `[B]`, `cache`, and `seen`
    bool `[B, V]` or None. The draw of a row's token depends on the seed, the row's number and the
    token's position.
    """
    model = nnx.merge(graphdef, params)
    rows = jnp.arange(state["tokens"].shape[0])
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)

    def body(carry: tuple[jax.Array, dict[str, Any]]) -> tuple[jax.Array, dict[str, Any]]:
        count, state = carry
        last = state["lengths"] - 1
        x_BTD, cache = model(
            state["tokens"][rows, last][:, None], last[:, None], cache=state["cache"]
        )
        keys_B = jax.vmap(jax.random.fold_in)(row_keys, last)
        next_B = sample(model.logits(x_BTD)[:, 0], keys_B, state["seen"], how)
        done = state["done"] | (next_B == eot_id)
        place = jnp.where(
            done, state["tokens"].shape[1], state["lengths"]
        )  # out of range is dropped
        seen = None if state["seen"] is None else state["seen"].at[rows, next_B].max(~done)
        tokens = state["tokens"].at[rows, place].set(next_B, mode="drop")
        added = {
            "tokens": tokens,
            "lengths": state["lengths"] + ~done,
            "done": done,
            "cache": cache,
            "seen": seen,
        }
        return count + 1, state | added

    def goes_on(carry: tuple[jax.Array, dict[str, Any]]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1]["done"].all()

    return jax.lax.while_loop(goes_on, body, (jnp.int32(0), state))[1]


class Generator:
    """Generates with one loaded model; compiled programs are kept between calls.

    `model` has the parameters given as lists over the layers, in arrays of their own. With `donate`
    the arrays of the model given are deleted; without, both are in memory.
    """

    def __init__(self, model: LoadedModel, donate: bool = False):
        self.context = model.config.model.max_seq_length
        cache, everywhere = named(model.mesh, "batch", "heads", None, None), named(model.mesh)
        prefill_model = functools.partial(prefill, model.graphdef)
        self._prefill = jax.jit(prefill_model, static_argnums=2, out_shardings=cache)
        decode_model = functools.partial(decode, model.graphdef, eot_id=model.tokenizer.eot_id)
        state = dict.fromkeys(("tokens", "lengths", "done", "seen"), everywhere) | {"cache": cache}
        self._decode = jax.jit(
            decode_model, static_argnames="how", donate_argnums=1, out_shardings=state
        )
        layout = Layout.of(model.mesh)
        if layout.context * layout.stages > 1:
            what = (
                "generation does not divide the sequence or the layers (mesh axes context "
                "and pipeline)"
            )
            raise UserError(what, "Use data, fsdp and tensor")
        self._rows = layout.rows
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
        """Completes each prompt. A row's text depends on its prompt, its number and the seed, not
        on its neighbours.

        `max_tokens` counts new tokens per prompt; None is 100, or what the context holds. A text
        ends before the first of the strings `stop`. `on_text` is called with (row, new text) as the
        text comes. `seed` is from 0 to 2^32 - 1. UserError where a prompt is empty, or it and
        `max_tokens` do not fit the context.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        left = self._check_length(max(map(len, encoded)), max_tokens)
        with jax.set_mesh(self.model.mesh):
            state = self._start(encoded, left, how)
            lengths = np.array([len(ids) for ids in encoded])
            texts = [TextStream(self.model.tokenizer.token_bytes, stop) for _ in prompts]
            while any(text.finish_reason is None for text in texts):
                steps = min(STREAM_TOKENS, left)
                left -= steps
                state = self._decode(
                    self.model.params, state, np.int32(steps), np.uint32(seed), how=how
                )
                unused = len(state["done"]) - len(texts)
                tokens, new_lengths, ended = jax.device_get(
                    (state["tokens"], state["lengths"], state["done"])
                )
                for row, text in enumerate(texts):
                    if text.finish_reason is None:
                        new = text.add(tokens[row, lengths[row] : new_lengths[row]])
                        if text.finish_reason is None and (ended[row] or left == 0):
                            new += text.end("stop" if ended[row] else "length")
                        if on_text:
                            on_text(row, new)
                lengths = new_lengths
                done = np.array(
                    [text.finish_reason is not None for text in texts] + [True] * unused
                )
                state["done"] = jax.device_put(done, named(self.model.mesh))
        return [Completion(text.text, text.num_tokens, str(text.finish_reason)) for text in texts]

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens, after end-of-text where the model has only ever seen documents from
        their start."""
        if not prompt:
            raise UserError("the prompt is empty", "Give at least one character")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "the prompt is not valid UTF-8", "Check the terminal's encoding"
            ) from error
        start = [self.model.tokenizer.eot_id] if self.model.config.data.document_mask else []
        return start + self.model.tokenizer.encode(prompt)

    def _check_length(self, prompt: int, max_tokens: int | None) -> int:
        room = self.context - prompt
        if room < 1:
            what = f"the prompt has {prompt} tokens, and the model's context is {self.context}"
            raise UserError(what, f"Shorten the prompt to {self.context - 1} tokens or fewer")
        if max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if max_tokens < 1:
            raise UserError(f"`max_tokens` is {max_tokens}", "Give 1 or more")
        if max_tokens > room:
            what = (
                f"the prompt's {prompt} tokens and `max_tokens` {max_tokens} exceed the "
                f"context of {self.context}"
            )
            raise UserError(what, f"Set `max_tokens` to {room} or less")
        return max_tokens

    def _start(
        self, encoded: list[list[int]], max_tokens: int, how: GenerationConfig
    ) -> dict[str, Any]:
        count, batch = (
            len(encoded),
            -(-len(encoded) // self._rows) * self._rows,
        )  # rows divide over the devices
        longest = max(map(len, encoded))
        prompt, length = (
            min(-(-n // _ROUND) * _ROUND, self.context) for n in (longest, longest + max_tokens)
        )
        tokens = np.zeros((batch, length), np.int32)
        seen = np.zeros((batch, self.model.params["token_embedding"].shape[0]), bool)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
            seen[row, ids] = True
        seen[:, self.model.tokenizer.eot_id] = False  # `encode` may have put it there, not the user
        state = {
            "tokens": tokens,
            "lengths": np.array([len(ids) for ids in encoded] + [1] * (batch - count), np.int32),
            "done": np.arange(batch) >= count,
            "seen": seen if how.repetition_penalty != 1.0 else None,
        }
        placed = jax.device_put(state, named(self.model.mesh))
        return placed | {
            "cache": self._prefill(self.model.params, placed["tokens"][:, :prompt], length)
        }


def choose_generation(model: LoadedModel, given: Mapping[str, float | None]) -> GenerationConfig:
    """The checkpoint's `generation` section, with what is given over it, checked as a config is.

    Args:
        model: the checkpoint's.
        given: values by the names of that section's keys; None leaves the checkpoint's value.

    Raises:
        UserError: one of them is not allowed.
    """
    overrides = [f"generation.{name}={value}" for name, value in given.items() if value is not None]
    written = dump_config(model.config)

    return config_from_text(written, display_name(model.path), overrides, of_a_run=True).generation


def generate(
    model: LoadedModel,
    prompts: str | Sequence[str],
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    **sampling: float | None,
) -> list[Completion]:
    """Completes prompts. For many calls with one model make a `Generator`, which keeps what it
    compiles.

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
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    how = choose_generation(model, sampling)
    return Generator(model)(several, how, max_tokens=max_tokens, seed=seed, stop=stop)
