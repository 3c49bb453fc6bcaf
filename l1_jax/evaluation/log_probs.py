"""The log-probability of each token of a text, as a file with a JSON line a token."""

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from flax import nnx

from l1_jax.data.tokenizer import Tokenizer
from l1_jax.devices.processes import is_main
from l1_jax.errors import UserError, check_writable
from l1_jax.objectives.chunks import fit_chunks
from l1_jax.objectives.log_probs import token_log_probs
from l1_jax.objectives.next_token import run_model
from l1_jax.objectives.objective import Batch
from l1_jax.storage.files import naming, new_file, why_not
from l1_jax.storage.remote import is_url
from l1_jax.training.state import Tree
from l1_jax.training.step import EvalStep, EvalSums

# Of every file: the number of the first token.
_BEGINNING = b'{"number": 1, "id": '


def make_log_probs_step(graphdef: nnx.GraphDef) -> EvalStep:
    """An eval step of the next token's loss, which gives the log-probabilities of the targets too.

    Args:
        graphdef: the model's structure, from `transformer.build`.
    """

    def log_probs_step(params: Tree, borrowed: Tree, batch: Batch) -> EvalSums:
        model, output = run_model(graphdef, params, batch)
        num_chunks = fit_chunks(model, output.hidden)

        targets_BT1 = batch["targets"][..., None]
        log_probs_BT1 = token_log_probs(model, output.hidden, targets_BT1, num_chunks)
        log_probs_BT = log_probs_BT1[..., 0]

        weights_BT = batch["weights"]
        return EvalSums(
            loss=-(weights_BT * log_probs_BT).sum(),
            weight=weights_BT.sum(),
            stop=batch["stop"].any(),
            log_probs=log_probs_BT,
        )

    return log_probs_step


def check_output(path: str | Path | None, overwrite: bool) -> None:
    """Checks where the file is to be written; None is nowhere.

    Raises:
        UserError: it cannot be written there, or would replace another.
    """
    if path is None:
        if overwrite:
            remedy = "Give the file that is to be replaced, or leave `overwrite` out"
            raise UserError("`overwrite` is given without `logprobs`", remedy)
        return

    remedy = "Choose another `logprobs`"
    if is_url(path):
        raise UserError(f"`logprobs` {path} is a URL", "Give a file on a local disk")

    path = Path(path)
    is_there = os.path.lexists(path)
    if is_there and not path.is_file():
        raise UserError(f"`logprobs` {path} is no file", remedy)
    if is_there and not overwrite:
        raise UserError(f"{path} exists", f"{remedy}, or replace it with `overwrite`")
    if is_there and not _is_ours(path):
        raise UserError(f"{path} holds no log-probabilities, and is not replaced", remedy)

    check_writable(path.parent, "`logprobs`")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"`logprobs` {path} cannot be written: {why_not(error)}"
        raise UserError(what, remedy) from error


def _is_ours(path: Path) -> bool:
    """Whether a file is empty, or begins as those that are written here."""
    with open(path, "rb") as file:
        beginning = file.read(len(_BEGINNING))
    return beginning in (b"", _BEGINNING)


class LogProbsFile:
    """Lines for the next tokens of a text.

    A write that fails is raised at the end: the processes that help to compute have to hear of it
    first, see `has_failed`.

    Args:
        file: takes the lines.
        stream: token ids `[tokens]`; the first is no target.
        tokenizer: by which the stream was made.
    """

    def __init__(self, file: TextIO, stream: np.ndarray, tokenizer: Tokenizer):
        self._file = file
        self._targets = enumerate(map(int, stream[1:]), start=1)
        self._describe = functools.cache(functools.partial(_describe, tokenizer))
        self.error: OSError | None = None

    def has_failed(self) -> bool:
        """Whether a write has failed."""
        return self.error is not None

    def write(self, log_probs: np.ndarray) -> None:
        """Writes the lines of the next tokens, float32 `[tokens]`; nothing after a failure."""
        if self.has_failed():
            return

        try:
            for log_prob in log_probs:
                number, token_id = next(self._targets)
                token = self._describe(token_id)
                logprob = _shortest(log_prob)
                self._file.write(f'{{"number": {number}, {token}, "logprob": {logprob}}}\n')
        except OSError as error:
            self.error = error


@contextlib.contextmanager
def log_probs_file(
    path: Path | None, stream: np.ndarray, tokenizer: Tokenizer
) -> Iterator[LogProbsFile | None]:
    """A file of log-probabilities, which is there when all of them are.

    Args:
        path: of the file; None writes none.
        stream: token ids `[tokens]`; the first is no target.
        tokenizer: by which the stream was made.

    Returns:
        What writes the next lines; None where this process writes no file.
    """
    if path is None or not is_main():
        yield None
        return

    with new_file(path) as file:
        lines = LogProbsFile(file, stream, tokenizer)
        yield lines

        if lines.error:
            # A full disk does not say whose file it is.
            with naming(path):
                raise lines.error


def _describe(tokenizer: Tokenizer, token_id: int) -> str:
    """The part of a line that is the same for all tokens of an id."""
    data = tokenizer.token_bytes(token_id)
    text = data.decode("utf-8", errors="replace")

    # The braces are the line's.
    return json.dumps({"id": token_id, "text": text, "bytes": list(data)})[1:-1]


def _shortest(value: np.float32) -> str:
    """The shortest decimal that gives the float32 back. JSON has no infinity."""
    return str(value) if math.isfinite(value) else "null"
