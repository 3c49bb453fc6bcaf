"""Rows of tokens on the device: begun, continued, copied, cut back, and a token added to each.

It knows no text and no tokenizer; `generate.py` makes text with it. Rows are begun and freed while
others go on. What is on the device goes from call to call as a `State`, whose arrays each call
takes over: the state that was given is gone afterwards.

Legend: B rows, R some of them, T new tokens of a row, V vocabulary (padded).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from l1_jax.errors import UserError
from l1_jax.inference.rows import MOST_STEPS, Decoded, Programs, State, StepOutput
from l1_jax.inference.sampling import Sampling
from l1_jax.model.transformer import unstack
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import named

# The number of new tokens in a call of `Engine.prefill` is a multiple of it, so that few programs
# are compiled.
CHUNK_TOKENS = 64

# With `exact` a device steps so many rows at once, and CHUNK_TOKENS of one row are put in at once:
# the bits of a product depend on its shape. On CPU 16 rows may give others than 8 do.
EXACT_ROWS = 8

Array = jax.Array | np.ndarray


class Engine:
    """A model that adds tokens to rows, each with settings, a seed and an end of its own.

    Programs are compiled once for each number of rows, slots and new tokens, and for nothing else.
    Arguments are arrays of the host or of the device; see `place`.

    A row's tokens depend on its own beginning, settings, seed and sample number. With `exact` so
    does every bit of its log-probabilities, on one kind of CPU and one number of threads: not on
    its neighbours, its place, the slots, nor on the parts in which its beginning was put in.

    Args:
        graphdef: the model's structure.
        params: its parameters, of `build`. As an attribute they are lists over the layers, in
            arrays of their own.
        mesh: where they lie. It divides rows and heads, neither the sequence nor the layers.
        end_ids: tokens that end a text.
        exact: a state has `EXACT_ROWS` rows a device, more rows are more states, and a row is begun
            by itself.
        donate: the arrays given are deleted; without, both are in memory.

    Raises:
        UserError: the mesh divides the sequence or the layers; or its devices cannot be exact.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        mesh: Mesh,
        *,
        end_ids: Sequence[int],
        exact: bool = False,
        donate: bool = False,
    ):
        _check_mesh(mesh, exact=exact)

        self.params = unstack(params, donate)
        self.mesh = mesh
        self.exact = exact
        # The rows of a state are a multiple of the first, and with `exact` no more than it.
        self.row_multiple = Layout.of(mesh).rows * (EXACT_ROWS if exact else 1)
        self.most_rows = self.row_multiple if exact else None

        programs = Programs(graphdef, tuple(end_ids))
        everywhere = named(mesh)
        placements: dict[str, Any] = {
            "tokens": everywhere,
            "lengths": everywhere,
            "seen": named(mesh, "batch", "vocab"),
            "cache": named(mesh, "batch", "heads", None, None),
        }
        placed = State(**placements)

        # Programs that give a state, and those that give tokens beside it.
        jit_state = functools.partial(jax.jit, out_shardings=placed)
        jit_state_and_output = functools.partial(
            jax.jit, donate_argnums=1, static_argnames="num_top", out_shardings=(placed, everywhere)
        )

        self._empty = jit_state(programs.empty, static_argnums=(1, 2))
        self._prefill = jit_state(programs.prefill, donate_argnums=1)
        self._copy = jit_state(programs.copy, donate_argnums=0)
        self._cut = jit_state(programs.cut, donate_argnums=0)
        self._step = jit_state_and_output(programs.step)
        self._decode = jit_state_and_output(programs.decode)

    def place(self, arrays: Any) -> Any:
        """Arrays of the host on all devices, for what is used by more than one call."""
        return jax.device_put(arrays, named(self.mesh))

    def empty(self, num_rows: int, num_slots: int) -> State:
        """Free rows.

        Args:
            num_rows: a multiple of `row_multiple`, at most `most_rows`.
            num_slots: tokens that a row can have; with `exact` a multiple of `CHUNK_TOKENS`, even
                if the model's context is not one.
        """
        assert num_rows % self.row_multiple == 0, "rows divide over the devices"
        if self.exact:
            assert num_rows == self.most_rows, "exact bits are those of one number of rows"
            assert num_slots % CHUNK_TOKENS == 0, "exact bits are those of whole vectors of slots"

        with jax.set_mesh(self.mesh):
            return self._empty(self.params, num_rows, num_slots)

    def begin(self, texts: Sequence[Sequence[int]], num_slots: int) -> State:
        """Rows that begin with these tokens, and free ones as they are needed to divide.

        Args:
            texts: one or more, each of a token or more; at most `most_rows`.
            num_slots: as of `empty`.
        """
        num_rows = _round_up(len(texts), self.row_multiple)
        state = self.empty(num_rows, num_slots)
        if self.exact:
            return self._begin_one_by_one(state, texts)

        longest = max(len(text) for text in texts)
        tokens = np.zeros((num_rows, min(_round_up(longest, CHUNK_TOKENS), num_slots)), np.int32)
        counts = np.zeros(num_rows, np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
            counts[row] = len(text)
        return self.prefill(state, tokens, counts)

    def _begin_one_by_one(self, state: State, texts: Sequence[Sequence[int]]) -> State:
        """As `begin`; a text that is there already is copied."""
        rows: dict[tuple[int, ...], int] = {}

        for row, text in enumerate(texts):
            source = rows.setdefault(tuple(text), row)
            if source != row:
                sources = np.array([source], np.int32)
                targets = np.array([row], np.int32)
                state = self.copy_rows(state, sources, targets)
                continue

            for first in range(0, len(text), CHUNK_TOKENS):
                part = text[first : first + CHUNK_TOKENS]
                tokens = np.zeros((1, CHUNK_TOKENS), np.int32)
                tokens[0, : len(part)] = part
                counts = np.array([len(part)], np.int32)
                state = self.prefill(state, tokens, counts, np.array([row], np.int32))

        return state

    def prefill(
        self, state: State, tokens_RT: Array, counts_R: Array, rows_R: Array | None = None
    ) -> State:
        """Puts tokens behind those of rows; a long text may come in parts.

        A row goes on behind its last token, so no place is given.

        Args:
            state: taken over.
            tokens_RT: int32, each row of it filled up at its end with any tokens.
            counts_R: int32, how many of them are real; 0 leaves a row as it is.
            rows_R: int32, which rows, each once. None is all, and then no part of the cache is
                copied.
        """
        if self.exact:
            assert tokens_RT.shape == (1, CHUNK_TOKENS), "exact bits are those of one shape"

        tokens_RT, counts_R, rows_R = self.place((tokens_RT, counts_R, rows_R))

        with jax.set_mesh(self.mesh):
            return self._prefill(self.params, state, tokens_RT, counts_R, rows_R)

    def copy_rows(self, state: State, sources_R: Array, targets_R: Array) -> State:
        """Rows again in other places, whatever was there.

        Args:
            state: taken over.
            sources_R: int32, the rows.
            targets_R: int32, where each goes; every place once.
        """
        sources_R, targets_R = self.place((sources_R, targets_R))

        with jax.set_mesh(self.mesh):
            return self._copy(state, sources_R, targets_R)

    def cut(self, state: State, rows_R: Array, lengths_R: Array) -> State:
        """The first tokens of rows alone; a length of 0 frees a row.

        Args:
            state: taken over.
            rows_R: int32, which rows, each once.
            lengths_R: int32, how many tokens each keeps; a shorter row stays as it is.
        """
        rows_R, lengths_R = self.place((rows_R, lengths_R))

        with jax.set_mesh(self.mesh):
            return self._cut(state, rows_R, lengths_R)

    def step(
        self,
        state: State,
        active_B: Array,
        sampling: Sampling,
        mask_BV: Array | None = None,
        num_top: int | None = None,
    ) -> tuple[State, StepOutput]:
        """Adds one token to each active row.

        Args:
            state: taken over.
            active_B: bool; the others stay as they are. An active row has a token, and a free slot.
            sampling: of each row.
            mask_BV: bool, false for tokens that must not be drawn; at least one of a row is true.
            num_top: how many of the likeliest tokens are wanted with their log-probabilities,
                beside that of the token drawn. None asks for no log-probabilities.
        """
        active_B, sampling, mask_BV = self.place((active_B, sampling, mask_BV))

        with jax.set_mesh(self.mesh):
            return self._step(self.params, state, active_B, sampling, mask_BV, num_top=num_top)

    def decode(
        self,
        state: State,
        active_B: Array,
        sampling: Sampling,
        num_steps: int,
        num_top: int | None = None,
    ) -> tuple[State, Decoded]:
        """Adds up to `num_steps` tokens to each active row, or fewer where one of them ends it.

        It is `step`, repeated on the device.

        Args:
            state: taken over.
            active_B: bool; an active row has a token, and slots for `num_steps` more.
            sampling: of each row.
            num_steps: at most `MOST_STEPS`.
            num_top: as of `step`.
        """
        assert num_steps <= MOST_STEPS, "the outputs have no place for more"
        active_B, sampling = self.place((active_B, sampling))

        with jax.set_mesh(self.mesh):
            return self._decode(
                self.params, state, active_B, sampling, np.int32(num_steps), num_top=num_top
            )


def _check_mesh(mesh: Mesh, *, exact: bool) -> None:
    """Checks that an engine runs on these devices.

    Raises:
        UserError: the mesh divides the sequence or the layers; or its devices cannot be exact.
    """
    layout = Layout.of(mesh)
    if layout.context * layout.stages > 1:
        what = (
            "generation does not divide the sequence or the layers (mesh axes context and pipeline)"
        )
        raise UserError(what, "Use data, fsdp and tensor")

    platform = mesh.devices.flat[0].platform
    if exact and platform != "cpu":
        what = f"`exact` is kept on CPU alone, and the model is on {platform}"
        raise UserError(what, "Leave `exact` out, or set `device` to cpu")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
