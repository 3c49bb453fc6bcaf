"""Loss, perplexity and bits per byte of a model on text, for a run and for the command."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from l1_jax.console import log
from l1_jax.data.batches import evaluation_batches
from l1_jax.data.readers.documents import find_files, read_documents
from l1_jax.data.sources import dims_of, token_fields
from l1_jax.data.store import Prepared, download_text, tokenize_documents
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.devices.compiled import keep_compiled
from l1_jax.devices.processes import is_main, together
from l1_jax.devices.select import select_devices
from l1_jax.errors import UserError
from l1_jax.evaluation.log_probs import check_output, log_probs_file, make_log_probs_step
from l1_jax.loading import load_model
from l1_jax.objectives.next_token import NextToken
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.mesh import ALL_DATA
from l1_jax.parallel.placement import fetch_rows, process_rows, put_batch, put_flag
from l1_jax.parallel.section import ParallelismConfig
from l1_jax.parallel.sharding import named
from l1_jax.storage.remote import display_name, is_url
from l1_jax.training.state import Tree
from l1_jax.training.step import EvalStep, make_eval_step

# exp of a little more overflows a float.
_MAX_EXPONENT = 700


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    `loss` is in nats per token; end-of-text tokens are targets, but no bytes.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def metrics(self) -> dict[str, float]:
        """What a run logs of it, after `val/`."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def _never() -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates a model on a token stream, in consecutive windows of the context length.

    Args:
        eval_step: of `make_eval_step` or `make_log_probs_step`, compiled.
        mesh: of the computation.
        stream: token ids `[tokens]`, laid out as the token store does; the first is no target.
        tokenizer: by which the stream was made.
        length: of a window, in tokens.
        batch_size: windows at a time, over all devices.
        eot_id: given where attention stays inside a document.
        max_rows: stop after so many windows; None evaluates everything.
        stop: asked before each batch, whether this process wants to leave off.
        write: takes the log-probabilities float32 of the next targets, if the step gives them.
    """

    eval_step: EvalStep
    mesh: Mesh
    stream: np.ndarray
    tokenizer: Tokenizer
    length: int
    batch_size: int
    eot_id: int | None = None
    max_rows: int | None = None
    stop: Callable[[], bool] = _never
    write: Callable[[np.ndarray], None] | None = None

    def __call__(self, params: Tree, borrowed: Tree) -> Evaluation | None:
        """The evaluation of a model; None where a process wanted to leave off.

        Args:
            params: all of its parameters.
            borrowed: what the step takes of other models, by name.
        """
        stream = self.stream
        if self.max_rows is not None:
            stream = stream[: self.max_rows * self.length + 1]

        rows = process_rows(self.mesh, self.batch_size)
        dims = dims_of(token_fields(self.length, document_mask=self.eot_id is not None))

        # Placed once, not with every batch.
        stop_flags = {asked: put_flag(asked, self.mesh) for asked in (False, True)}

        total = 0.0
        tokens = 0
        for batch in evaluation_batches(stream, self.length, self.batch_size, self.eot_id):
            local = {name: values[rows] for name, values in batch.items()}
            placed = put_batch(
                local, dims, rows=rows, mesh=self.mesh, global_batch_size=self.batch_size
            )
            placed["stop"] = stop_flags[self.stop()]

            sums = jax.device_get(self.eval_step(params, borrowed, placed))
            if sums.stop:
                return None
            total += float(sums.loss)
            tokens += int(sums.weight)

            if self.write:
                assert sums.log_probs is not None, "the step gives them"
                is_real = batch["weights"] > 0
                self.write(fetch_rows(sums.log_probs, self.mesh)[is_real])

        loss = total / tokens
        num_bytes = self._count_bytes(stream[1:])
        bits = total / math.log(2)
        return Evaluation(
            loss=loss,
            perplexity=math.exp(loss) if loss < _MAX_EXPONENT else math.inf,
            bits_per_byte=bits / max(num_bytes, 1),
            tokens=tokens,
            bytes=num_bytes,
        )

    def _count_bytes(self, tokens: np.ndarray) -> int:
        """Of the text that the tokens stand for."""
        vocab = range(self.tokenizer.vocab_size)
        bytes_of_token = np.array([len(self.tokenizer.token_bytes(token)) for token in vocab])
        return int(bytes_of_token[tokens].sum())


def read_stream(data: Path, tokenizer: Tokenizer, documents: str) -> np.ndarray:
    """The token stream of a text file, or of the test split of a prepared directory.

    A split's text file is recognised by its hash, and its stored tokens are used: they know where
    documents end.

    Args:
        data: the file or the directory.
        tokenizer: the model's.
        documents: what a document is in other files, `line` or `file`.

    Raises:
        UserError: there is no text.
    """
    prepared = _open_prepared(data)
    if prepared and data.is_dir():
        split = "test" if prepared.store("test").num_documents else "val"
        log.info("evaluating the %s split of %s", split, display_name(data))
        data = data / f"{split}.txt"
        prepared.check([data.name])

    files = find_files([data])
    stored = prepared.stored(data, tokenizer.sha256) if prepared else None
    if stored is not None and len(stored) > 1:
        return stored

    dropped: Counter[str] = Counter()
    found = read_documents(files, documents, lambda reason, _: dropped.update([reason]))
    stream = tokenize_documents((text for text in found if text.strip()), tokenizer)

    for reason, count in dropped.items():
        log.warning("%s: %d lines left out (%s)", data, count, reason)
    # The first token is no target.
    if len(stream) < 2:
        raise UserError(f"{data} holds no text to evaluate", "Give a file with text in it")
    return stream


def _open_prepared(data: Path) -> Prepared | None:
    """The prepared directory that `data` is, or that a file lies in; None where it is none.

    Raises:
        UserError: `data` is a directory, and not a prepared one.
    """
    is_directory = data.is_dir()
    try:
        return Prepared.open(data if is_directory else data.parent)
    except UserError:
        if is_directory:
            raise
        return None


def fit_batch(num_windows: int, batch_size: int, layout: Layout) -> int:
    """Windows at a time, over all devices.

    They are `batch_size` for each part of a batch, or fewer where all there are fit.
    """
    windows_per_step = layout.rows * layout.microbatches
    needed = -(-num_windows // windows_per_step) * layout.microbatches
    return layout.rows * min(batch_size, needed)


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    device: str = "auto",
    batch_size: int = 16,
    mesh: ParallelismConfig = ALL_DATA,
    weights: str | None = None,
    logprobs: str | Path | None = None,
    overwrite: bool = False,
) -> Evaluation:
    """Evaluates a model on text.

    Args:
        model: a checkpoint, or a run (its best model); a path or a URL.
        data: a text file, or a prepared directory (its test split); a path or a URL.
        device: what to run on, see `select_devices`.
        batch_size: sequences per device at a time.
        mesh: how to use several devices.
        weights: `average` or `raw`; None is their average where the run kept one.
        logprobs: a file to be written, with a JSON line for each token that is predicted.
        overwrite: replaces that file.

    Raises:
        UserError: the model is damaged or does not fit the devices, there is no text, or the file
            cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"`batch_size` is {batch_size}", "Give 1 or more")

    with together():
        # The main process writes the file, perhaps where the others have no such directory.
        if is_main():
            check_output(logprobs, overwrite)

        devices = select_devices(device)
        keep_compiled(devices)
        loaded = load_model(model, devices, mesh, batch_size, weights)

        path = download_text(str(data)) if is_url(data) else Path(data)
        stream = read_stream(path, loaded.tokenizer, loaded.info.documents)

    length = loaded.config.model.max_seq_length
    num_targets = len(stream) - 1
    num_windows = -(-num_targets // length)
    layout = Layout.of(loaded.mesh, batch_size, mesh.pipeline_microbatches)

    # Text is always evaluated by its next tokens, whatever the model was trained for.
    if logprobs is None:
        eval_step = make_eval_step(loaded.graphdef, NextToken())
    else:
        eval_step = make_log_probs_step(loaded.graphdef)

    evaluator = Evaluator(
        eval_step=jax.jit(eval_step, out_shardings=named(loaded.mesh)),
        mesh=loaded.mesh,
        stream=stream,
        tokenizer=loaded.tokenizer,
        length=length,
        batch_size=fit_batch(num_windows, batch_size, layout),
        eot_id=loaded.tokenizer.eot_id if loaded.config.data.document_mask else None,
    )

    file_path = None if logprobs is None else Path(logprobs)
    file = log_probs_file(file_path, stream, loaded.tokenizer)
    with jax.set_mesh(loaded.mesh), file as lines:
        if lines:
            evaluator = dataclasses.replace(evaluator, write=lines.write, stop=lines.has_failed)
        result = evaluator(loaded.params, borrowed={})

    if result is None:
        what = "the main process could not write `logprobs`"
        raise UserError(what, "Its message says why")
    return result
