"""Loss, perplexity and bits per byte of a model on text: the same code for the run and for the script."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from l1_jax.cli import log
from l1_jax.data.batches import evaluation_batches
from l1_jax.data.corpus import find_files, read_documents
from l1_jax.data.token_store import Prepared, tokenize_documents
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import UserError
from l1_jax.loading import load_model
from l1_jax.parallel.mesh import select_devices
from l1_jax.parallel.sharding import batch_shards, process_rows, put_batch
from l1_jax.training.step import make_eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. `loss` is in nats per token; end-of-text tokens are targets, but no bytes."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int


class Evaluator:
    """Evaluates a model on a token stream, in consecutive windows of the context length.

    Args:
        eval_step: from (params, batch) to (sum(weight * nll), sum(weight)), compiled.
        mesh: where the batches go.
        stream: 1-D token ids, laid out as the token store does; its first token is no target.
        tokenizer: what made them; says how many bytes each token stands for.
        length: the window in tokens.
        batch_size: windows at a time, over all devices.
        eot_id: given where attention stays inside a document.
        max_rows: stop after so many windows; None evaluates everything.
    """

    def __init__(
        self,
        eval_step: Callable[[Any, Any], tuple[jax.Array, jax.Array]],
        mesh: Mesh,
        stream: np.ndarray,
        tokenizer: Tokenizer,
        *,
        length: int,
        batch_size: int,
        eot_id: int | None = None,
        max_rows: int | None = None,
    ):
        self._eval_step, self._mesh, self._batch_size = eval_step, mesh, batch_size
        self._rows = process_rows(mesh, batch_size)
        self._stream = stream if max_rows is None else stream[: max_rows * length + 1]
        self._batches = lambda: evaluation_batches(self._stream, length, batch_size, eot_id)
        byte_counts = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
        self._bytes = int(byte_counts[self._stream[1:]].sum())

    def __call__(self, params: dict[str, Any]) -> Evaluation:
        total, weight = 0.0, 0.0
        for batch in self._batches():
            local = {name: rows[self._rows] for name, rows in batch.items()}
            sums = self._eval_step(params, put_batch(local, self._mesh, self._batch_size))
            nll, count = jax.device_get(sums)
            total, weight = total + float(nll), weight + float(count)
        return summarise(total, int(weight), self._bytes)


def summarise(nll: float, tokens: int, num_bytes: int) -> Evaluation:
    """Figures from sums: `nll` in nats over `tokens` targets that stand for `num_bytes` bytes of text."""
    loss = nll / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Evaluation(loss, perplexity, nll / math.log(2) / max(num_bytes, 1), tokens, num_bytes)


def read_stream(data: Path, tokenizer: Tokenizer, documents: str) -> np.ndarray:
    """The token stream of a text file, or of the test split of a prepared directory.

    A split's text file is recognised by its hash, and its stored tokens are used: they know where documents end.

    Args:
        data: a text file in any format of `data.corpus`, or a prepared directory.
        tokenizer: the model's.
        documents: `line` or `file`: what a document is in a text file.

    Raises:
        UserError: there is no text.
    """
    if data.is_dir():
        prepared = Prepared.open(data)
        split = "test" if prepared.store("test").num_documents else "val"
        log.info("evaluating the %s split of %s", split, data)
        data = data / f"{split}.txt"
    if (data.parent / "manifest.json").is_file():
        stored = Prepared.open(data.parent).stored(data, tokenizer.sha256)
        if stored is not None:
            return stored
    dropped: Counter[str] = Counter()
    found = read_documents(find_files([data]), documents, lambda reason, _: dropped.update([reason]))
    stream = tokenize_documents((text for text in found if text.strip()), tokenizer)
    for reason, count in dropped.items():
        log.warning("%s: %d lines left out (%s)", data, count, reason)
    if len(stream) < 2:
        raise UserError(f"{data} holds no text to evaluate", "Give a file with text in it")
    return stream


def evaluate_path(model_path: str, data: str, device: str = "auto", batch_size: int = 16) -> Evaluation:
    """Evaluates a checkpoint on a text file or a prepared directory: what scripts/evaluate.py prints.

    Args:
        model_path: a checkpoint, or a run directory: its best model.
        data: see `read_stream`.
        device: see `parallel.mesh.select_devices`.
        batch_size: sequences per device at a time.

    Raises:
        UserError: the checkpoint or the text is not there, or not usable.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}", "Give 1 or more")
    model = load_model(model_path, select_devices(device))
    stream = read_stream(Path(data), model.tokenizer, model.info.documents)
    shards = batch_shards(model.mesh)
    with jax.set_mesh(model.mesh):
        evaluator = Evaluator(
            jax.jit(make_eval_step(model.graphdef, shards)),
            model.mesh,
            stream,
            model.tokenizer,
            length=model.config.model.max_seq_length,
            batch_size=batch_size * shards,
            eot_id=model.tokenizer.eot_id if model.config.data.document_mask else None,
        )
        return evaluator(model.params)
