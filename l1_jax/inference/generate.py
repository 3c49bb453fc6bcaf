"""Text from a prompt: an engine continues its tokens, and they become text as they come."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from l1_jax.config.yaml_file import config_from_text, dump_config
from l1_jax.errors import UserError, nearest
from l1_jax.inference.engine import CHUNK_TOKENS, Engine
from l1_jax.inference.rows import MOST_STEPS, State
from l1_jax.inference.sampling import Sampling
from l1_jax.inference.section import GenerationConfig
from l1_jax.inference.text_stream import TextStream
from l1_jax.loading import LoadedModel
from l1_jax.storage.remote import display_name

DEFAULT_MAX_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class Completion:
    """What followed a prompt.

    `tokens` counts the new ones, without end-of-text. `finish_reason` is "stop" (end of text or a
    stop string) or "length" (`max_tokens`).
    """

    text: str
    tokens: int
    finish_reason: str


class Generator:
    """Generates with one loaded model; compiled programs are kept between calls.

    Args:
        model: of a checkpoint. As an attribute it has its parameters as lists over the layers, in
            arrays of their own.
        donate: the arrays of the model given are deleted; without, both are in memory.
        exact: a row's bits do not depend on how many rows there are, see `Engine`.

    Raises:
        UserError: the model's mesh divides the sequence or the layers; or `exact` cannot be kept.
    """

    def __init__(self, model: LoadedModel, donate: bool = False, exact: bool = False):
        self.context = model.config.model.max_seq_length
        self.engine = Engine(
            model.graphdef,
            model.params,
            model.mesh,
            end_ids=model.tokenizer.end_ids,
            exact=exact,
            donate=donate,
        )
        self.model = dataclasses.replace(model, params=self.engine.params)

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
        longest = max(map(len, encoded))
        max_tokens = self._check_length(longest, max_tokens)
        num_slots = self._num_slots(longest + max_tokens)

        texts = [TextStream(self.model.tokenizer.token_bytes, stop) for _ in prompts]
        num_together = self.engine.most_rows or len(texts)

        for first in range(0, len(texts), num_together):
            part = slice(first, first + num_together)
            state = self.engine.begin(encoded[part], num_slots)
            sampling = self._sampling(how, seed, first, num_rows=len(state.lengths))

            for row, new_text in self._complete(texts[part], state, sampling, max_tokens):
                if on_text:
                    on_text(first + row, new_text)

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

    def _num_slots(self, num_tokens: int) -> int:
        """Slots for so many tokens; of the few numbers for which programs are compiled."""
        multiple = -(-num_tokens // CHUNK_TOKENS) * CHUNK_TOKENS
        return multiple if self.engine.exact else min(multiple, self.context)

    def _sampling(self, how: GenerationConfig, seed: int, first: int, num_rows: int) -> Sampling:
        """The settings of each row, on the device; `first` is the number of the first sample."""
        sampling = Sampling.of(
            settings=[how] * num_rows,
            seeds=[seed] * num_rows,
            numbers=range(first, first + num_rows),
        )
        return self.engine.place(sampling)

    def _complete(
        self, texts: list[TextStream], state: State, sampling: Sampling, tokens_left: int
    ) -> Iterator[tuple[int, str]]:
        """Adds tokens to texts until each is ended; gives (row, new text) as they come.

        Args:
            texts: of the first rows of the state.
            state: with the prompts in it.
            sampling: of each row.
            tokens_left: the most that a text may have.
        """
        while any(text.finish_reason is None for text in texts):
            num_steps = min(MOST_STEPS, tokens_left)
            tokens_left -= num_steps

            # The device does not know of stop strings. Rows that fill up the state have no text.
            active = np.zeros(len(state.lengths), bool)
            active[: len(texts)] = [text.finish_reason is None for text in texts]

            state, decoded = self.engine.decode(state, active, sampling, num_steps)
            tokens, counts, ended = jax.device_get(
                (decoded.steps.tokens, decoded.counts, decoded.ended)
            )

            for row, text in enumerate(texts):
                if text.finish_reason is not None:
                    continue
                new_tokens = tokens[row, : counts[row]]
                new_text = _extend(text, new_tokens, is_ended=ended[row], is_full=tokens_left == 0)
                yield row, new_text


def _extend(text: TextStream, tokens: np.ndarray, *, is_ended: bool, is_full: bool) -> str:
    """Adds a row's new tokens to its text; returns what is new of it.

    Args:
        text: of the row.
        tokens: those that are new.
        is_ended: the last of them is no text: it ends it.
        is_full: no more will be made.
    """
    new_text = text.add(tokens[:-1] if is_ended else tokens)
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
    exact: bool = False,
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
        exact: a completion's bits do not depend on how many there are, see `Engine`; on CPU alone.
        sampling: keys of the `generation` section, as temperature, instead of the checkpoint's.

    Raises:
        UserError: a prompt or a setting cannot be used, or `exact` not kept.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    how = choose_generation(model, sampling)
    generator = Generator(model, exact=exact)
    return generator(list(prompts), how, max_tokens=max_tokens, seed=seed, stop=stop)
