"""Text from a prompt: one prefill, then an on-device loop over a static key/value cache.

Legend: B batch, T prompt length (padded), S cache length, V vocabulary (padded).
"""

import codecs
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from l1_jax.errors import UserError
from l1_jax.inference.sampling import Sampling, sample
from l1_jax.loading import LoadedModel
from l1_jax.model.attention import empty_cache

DEFAULT_MAX_TOKENS = 100
STREAM_TOKENS = 8  # tokens made on the device between two looks of the host: for printing and stop strings
_ROUND = 64  # lengths are rounded up to it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt. `tokens` counts the new tokens, the end-of-text token not included."""

    text: str
    tokens: int
    finish_reason: str  # "stop": end of text or a stop string; "length": max_tokens


def prefill(graphdef: nnx.GraphDef, params: Any, tokens_BT: jax.Array, length: int):
    """The cache of `length` slots with the prompts in it. Slots past a prompt's end are written over later."""
    model = nnx.merge(graphdef, params)
    batch, prompt = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(prompt), (batch, prompt))
    cache = empty_cache(model.config, batch, length, model.dtype)
    return model(tokens_BT, positions_BT, cache=cache)[1]


def decode(graphdef: nnx.GraphDef, params: Any, state: dict[str, Any], steps: jax.Array, eot_id: int, how: Sampling):
    """Adds up to `steps` tokens to every row that is not done; a row is done at its end-of-text token.

    Args:
        state: `tokens` int32 `[B, S]`, `lengths` int32 `[B]`, `done` bool `[B]`, `keys` `[B]`, `cache`, and `seen` bool
            `[B, V]` or None.
        steps: int32 scalar.
        eot_id, how: static.

    Returns:
        The state after them.
    """
    model = nnx.merge(graphdef, params)
    rows = jnp.arange(state["tokens"].shape[0])

    def body(carry):
        count, state = carry
        last = state["lengths"] - 1
        x_BTD, cache = model(state["tokens"][rows, last][:, None], last[:, None], cache=state["cache"])
        keys_B = jax.vmap(jax.random.fold_in)(state["keys"], last)
        next_B = sample(model.logits(x_BTD)[:, 0], keys_B, state["seen"], how)
        end = (next_B == eot_id) & ~state["done"]
        add = ~state["done"] & ~end
        place = jnp.where(add, state["lengths"], state["tokens"].shape[1])  # out of range: dropped
        seen = state["seen"]
        return count + 1, state | {
            "tokens": state["tokens"].at[rows, place].set(next_B, mode="drop"),
            "lengths": state["lengths"] + add,
            "done": state["done"] | end,
            "cache": cache,
            "seen": None if seen is None else seen.at[rows, next_B].max(add),
        }

    def unfinished(carry):
        return (carry[0] < steps) & ~carry[1]["done"].all()

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]


class Generator:
    """Generates with one loaded model; compiled programs are kept between calls."""

    def __init__(self, model: LoadedModel):
        self.model = model
        self._prefill = jax.jit(functools.partial(prefill, model.graphdef), static_argnums=2)
        self._decode = jax.jit(
            functools.partial(decode, model.graphdef), static_argnames=("eot_id", "how"), donate_argnums=1
        )

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens, after end-of-text where the model has only ever seen documents from their start."""
        if not prompt:
            raise UserError("the prompt is empty", "Give at least one character")
        if not _is_unicode(prompt):
            raise UserError("the prompt is not valid UTF-8", "Check the terminal's encoding")
        start = [self.model.tokenizer.eot_id] if self.model.config.data.document_mask else []
        return start + self.model.tokenizer.encode(prompt)

    def __call__(
        self,
        prompts: Sequence[str],
        how: Sampling,
        *,
        max_tokens: int | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] = lambda row, text: None,
    ) -> list[Completion]:
        """Completes each prompt. A row's text depends on its prompt, its number and the seed, not on its neighbours.

        Args:
            prompts: of any lengths.
            how: how tokens are drawn.
            max_tokens: new tokens per prompt; None is 100, or what the context holds.
            seed: of the draws.
            stop: strings at which a text ends, without them.
            on_text: called with (row, new text) as the text comes.

        Raises:
            UserError: a prompt is empty, or it and `max_tokens` do not fit the context.
        """
        encoded = [self.encode(prompt) for prompt in prompts]
        max_tokens = self._check_length(max(map(len, encoded)), max_tokens)
        state = self._start(encoded, max_tokens, seed, how)
        lengths = [len(ids) for ids in encoded]
        texts = [TextStream(self.model.tokenizer.token_bytes, stop) for _ in prompts]
        made, done = 0, False
        while not done:
            steps = min(STREAM_TOKENS, max_tokens - made)
            state = self._decode(
                self.model.params, state, jnp.int32(steps), eot_id=self.model.tokenizer.eot_id, how=how
            )
            made += steps
            tokens, new_lengths, ended = jax.device_get((state["tokens"], state["lengths"], state["done"]))
            for row, text in enumerate(texts):
                if text.finish_reason is None:
                    new = text.add(tokens[row, lengths[row] : new_lengths[row]])
                    if text.finish_reason is None and (ended[row] or made == max_tokens):
                        new += text.end("stop" if ended[row] else "length")
                    on_text(row, new)
            lengths = list(new_lengths)
            finished = np.array([text.finish_reason is not None for text in texts])
            state["done"] = jnp.asarray(finished)
            done = bool(finished.all())
        return [Completion(text.text, text.num_tokens, text.finish_reason or "length") for text in texts]

    def _check_length(self, prompt: int, max_tokens: int | None) -> int:
        context = self.model.config.model.max_seq_length
        room = context - prompt
        if room < 1:
            raise UserError(
                f"the prompt has {prompt} tokens and the model's context {context}",
                f"Shorten the prompt to {context - 1} tokens or fewer",
            )
        if max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if max_tokens < 1:
            raise UserError(f"--max-tokens is {max_tokens}", "Give 1 or more")
        if max_tokens > room:
            raise UserError(
                f"the prompt's {prompt} tokens and --max-tokens {max_tokens} exceed the model's context of {context}",
                f"Set --max-tokens to {room} or less",
            )
        return max_tokens

    def _start(self, encoded: list[list[int]], max_tokens: int, seed: int, how: Sampling) -> dict[str, Any]:
        context = self.model.config.model.max_seq_length

        def rounded(length: int) -> int:
            return min(-(-length // _ROUND) * _ROUND, context)

        longest = max(map(len, encoded))
        tokens = np.zeros((len(encoded), rounded(longest + max_tokens)), np.int32)
        for row, ids in enumerate(encoded):
            tokens[row, : len(ids)] = ids
        seen = None
        if how.repetition_penalty != 1.0:
            seen = np.zeros((len(encoded), self.model.params["token_embedding"].shape[0]), bool)
            for row, ids in enumerate(encoded):
                seen[row, ids] = True
        key = jax.random.key(seed)
        return {
            "tokens": jnp.asarray(tokens),
            "lengths": jnp.asarray([len(ids) for ids in encoded], jnp.int32),
            "done": jnp.zeros(len(encoded), bool),
            "keys": jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(encoded))),
            "cache": self._prefill(self.model.params, jnp.asarray(tokens[:, : rounded(longest)]), tokens.shape[1]),
            "seen": None if seen is None else jnp.asarray(seen),
        }


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that were no UTF-8
        return False
    return True


class TextStream:
    """Tokens of one text in, text out as soon as it is certain: whole characters, and no part of a stop string.

    Attributes:
        text: what has been let out.
        num_tokens: tokens taken in up to the end.
        finish_reason: None until the end.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str]):
        self._token_bytes, self._stop = token_bytes, [s for s in stop if s]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.text, self.num_tokens = "", 0
        self.finish_reason: str | None = None

    def add(self, tokens: Sequence[int]) -> str:
        """Takes tokens in; returns the text that is new. Ends at the first stop string."""
        out = ""
        for token in tokens:
            self.num_tokens += 1
            out += self._let_out(self._decoder.decode(self._token_bytes(int(token))))
            if self.finish_reason:
                break
        return out

    def end(self, reason: str) -> str:
        """Ends the text; returns what was held back."""
        out = self._let_out(self._decoder.decode(b"", final=True), final=True)
        self.finish_reason = self.finish_reason or reason
        return out

    def _let_out(self, text: str, final: bool = False) -> str:
        self._held += text
        found = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if found:
            self.finish_reason = "stop"
            out, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((self._overlap(s) for s in self._stop), default=0)
            out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.text += out
        return out

    def _overlap(self, stop: str) -> int:
        """How many of the last characters could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if stop.startswith(self._held[-n:])), 0)
