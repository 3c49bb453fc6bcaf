"""The one pipeline: corpus -> cleaning -> split -> tokenizer -> token store."""

import bisect
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from l1_jax import __version__
from l1_jax.cli import console, log
from l1_jax.data import token_store
from l1_jax.data.cleaning import Ledger, Seen, clean
from l1_jax.data.corpus import Source, Watch, find_files, read_documents
from l1_jax.data.token_store import SPLITS, TokenWriter, hash_file
from l1_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from l1_jax.errors import UserError


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    train_ratio: float,
    val_ratio: float,
    seed: int,
    documents: str = "line",
    split: str = "random",
    tokenizer: str = "bpe",
    dedup: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a prepared directory out of text files. It appears whole or not at all.

    Args:
        inputs: files and directories of text.
        output: the directory to make.
        vocab_size: the most tokens that the tokenizer may have.
        train_ratio: the part for training, above 0.
        val_ratio: the part for validation; the rest is for testing.
        seed: of the random split.
        documents: "line" or "file", what a document is.
        split: "random", by each document's text and the seed; or "contiguous", by position in the corpus.
        tokenizer: "bpe", trained on the training split; "bytes"; or the path of a tokenizer.json.
        dedup: whether to drop exact duplicates.
        overwrite: whether to replace a prepared directory at `output`.

    Returns:
        The manifest.

    Raises:
        UserError: the input or a setting is wrong; nothing is left behind then.
    """
    if not (train_ratio > 0 and val_ratio >= 0 and train_ratio + val_ratio <= 1 + 1e-9):
        what = f"training ratio {train_ratio} and validation ratio {val_ratio} do not divide the text"
        raise UserError(what, "Give ratios between 0 and 1 whose sum is at most 1, the first above 0")
    sources = find_files(inputs)
    target = Path(output).resolve()
    _check_output(target, inputs, overwrite)
    given = (
        None if tokenizer == "bpe" else Tokenizer.bytes_only() if tokenizer == "bytes" else Tokenizer.load(tokenizer)
    )
    needed = given.vocab_size if given else MIN_VOCAB_SIZE
    if vocab_size < needed:
        raise UserError(
            f"vocabulary size {vocab_size} is below the {needed} tokens needed", "Give a larger --vocab-size"
        )
    settings = {
        "cleaning": {"documents": documents, "dedup": dedup},
        "split": {"split": split, "train_ratio": train_ratio, "val_ratio": val_ratio, "seed": seed},
        "tokenizer": {"tokenizer": str(tokenizer), "vocab_size": vocab_size},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        (partial / "tokens").mkdir(parents=True)
        manifest = _build(partial, sources, settings, given)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _build(
    directory: Path, sources: list[Source], settings: dict[str, dict[str, Any]], tok: Tokenizer | None
) -> dict[str, Any]:
    columns = TextColumn("{task.description:<22}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def watch(stage: str, paths: Iterable[Path], passes: int = 1) -> Watch:
            task = progress.add_task(stage, total=passes * sum(path.stat().st_size for path in paths))
            return functools.partial(progress.wrap_file, task_id=task)

        raw = [path for _, path in sources]
        passes = 2 if settings["split"]["split"] == "contiguous" else 1
        ledger, texts = _write_splits(directory, sources, settings, watch("reading", raw, passes))
        if tok is None:
            wanted, train = settings["tokenizer"]["vocab_size"], texts["train"]
            tok = Tokenizer.train(train.read(watch("training the tokenizer", [train.path])), wanted)
            if tok.vocab_size < wanted:
                log.info(
                    f"the corpus gives {tok.vocab_size} tokens of the {wanted} asked for; "
                    "model.vocab_size is a ceiling, so nothing needs changing"
                )
        tok.save(directory / "tokenizer.json")
        counts = {}
        encoding = watch("encoding", [text.path for text in texts.values()])
        for name, text in texts.items():
            with TokenWriter(directory, name, tok) as writer:
                for ids, num_bytes in zip(tok.encode_documents(text.read(encoding)), text.lengths(), strict=True):
                    writer.add(ids, num_bytes)
            counts[name] = writer.counts
            text.lengths_path.unlink()

    dtype = tok.dtype.str
    stores = sorted((directory / "tokens").iterdir())
    links = {
        "raw": [{"name": name, "bytes": path.stat().st_size, "sha256": hash_file(path)} for name, path in sources],
        "cleaning": settings["cleaning"],
        "split": settings["split"] | {text.path.name: hash_file(text.path) for text in texts.values()},
        "tokenizer": {"vocab_size": tok.vocab_size, "sha256": tok.sha256},
        "tokens": {"dtype": dtype} | {f"tokens/{path.name}": hash_file(path) for path in stores},
    }
    return {
        "version": token_store.MANIFEST_VERSION,
        "created_by": f"l1_jax {__version__}",
        "settings": settings["cleaning"] | settings["split"] | settings["tokenizer"],
        "ledger": ledger.as_dict(),
        "splits": counts,
        "vocab_size": tok.vocab_size,
        "eot_id": tok.eot_id,
        "tokenizer_sha256": tok.sha256,
        "dtype": dtype,
        "hash_chain": token_store.hash_chain(links),
    }


class _SplitText:
    """A split's text while it is prepared: `<name>.txt`, and beside it the length of each document, because a
    document may hold line ends."""

    def __init__(self, directory: Path, name: str, separator: bytes):
        self.path, self.lengths_path = directory / f"{name}.txt", directory / f"{name}.lengths"
        self.num_documents, self._separator = 0, separator

    def __enter__(self) -> Self:
        self._text, self._lengths = open(self.path, "wb"), open(self.lengths_path, "wb")
        return self

    def __exit__(self, *exception: object) -> None:
        self._text.close()
        self._lengths.close()

    def write(self, text: str) -> None:
        data = text.encode()
        self._text.write(data + self._separator)
        self._lengths.write(len(data).to_bytes(8, "little"))
        self.num_documents += 1

    def lengths(self) -> Iterator[int]:
        with open(self.lengths_path, "rb") as file:
            while block := file.read(1 << 19):
                yield from np.frombuffer(block, "<i8").tolist()

    def read(self, watch: Watch) -> Iterator[str]:
        with open(self.path, "rb") as raw:
            file = watch(raw)
            for length in self.lengths():
                yield file.read(length + len(self._separator))[:length].decode()


def _write_splits(
    directory: Path, sources: list[Source], settings: dict[str, dict[str, Any]], watch: Watch
) -> tuple[Ledger, dict[str, _SplitText]]:
    mode, split = settings["cleaning"]["documents"], settings["split"]

    def kept(ledger: Ledger) -> Iterator[str]:
        with tempfile.TemporaryDirectory(dir=directory) as scratch, closing(Seen(Path(scratch, "seen"))) as seen:
            documents = read_documents(sources, mode, ledger.drop, watch)
            yield from clean(documents, ledger, seen if settings["cleaning"]["dedup"] else None)

    # As exact decimals: 0.7 + 0.2 as floats is below 0.9, and a cut must not be off by one for that.
    train_end = Fraction(str(split["train_ratio"]))
    ends = [train_end, min(train_end + Fraction(str(split["val_ratio"])), Fraction(1))]
    ledger = Ledger()
    if split["split"] == "random":
        assigned = split_random(kept(ledger), ends, split["seed"])
    else:
        total = sum(len(text.encode()) for text in kept(Ledger()))
        assigned = split_contiguous(kept(ledger), [int(total * end) for end in ends], cut_documents=mode == "file")
    texts = {name: _SplitText(directory, name, b"\n" if mode == "line" else b"") for name in SPLITS}
    with ExitStack() as files:
        for text in texts.values():
            files.enter_context(text)
        for name, document in assigned:
            texts[name].write(document)
    if not ledger.kept:
        raise UserError("the input has no text: nothing was left of it", "Give files with text in them")
    if not texts["train"].num_documents:
        what = f"the training split is empty: {ledger.kept} documents are too few for a ratio of {split['train_ratio']}"
        raise UserError(what, "Give more text, a larger --train-ratio, or --split contiguous")
    if not texts["val"].num_documents:
        log.warning("the validation split is empty: training will skip validation")
    if not texts["test"].num_documents and ends[1] < 1:
        log.warning("the test split is empty")
    return ledger, texts


def split_random(documents: Iterable[str], ends: Sequence[Fraction], seed: int) -> Iterator[tuple[str, str]]:
    """(split, document) by the document's text and the seed alone, so that adding data moves nothing.

    Args:
        documents: the text of each.
        ends: where training and validation end, as parts of 1.
        seed: a different one gives a different split.
    """
    thresholds = [int(end * 2**64) for end in ends]
    for text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
        yield SPLITS[bisect.bisect_right(thresholds, int.from_bytes(digest, "big"))], text


def split_contiguous(documents: Iterable[str], cuts: Sequence[int], cut_documents: bool) -> Iterator[tuple[str, str]]:
    """(split, document) by position.

    Args:
        documents: the text of each.
        cuts: where training and validation end, in bytes of text from the start.
        cut_documents: whether a cut goes through a document, before the character that it falls in; else a document
            goes where its first byte does.
    """
    start = 0
    for text in documents:
        data = text.encode()
        if not cut_documents:
            yield SPLITS[bisect.bisect_right(cuts, start)], text
        else:
            begin = 0
            for name, cut in zip(SPLITS, [*cuts, start + len(data)], strict=True):
                end = min(max(cut - start, begin), len(data))
                while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
                if end > begin:
                    yield name, data[begin:end].decode()
                begin = end
        start += len(data)


def _check_output(target: Path, inputs: Sequence[str | Path], overwrite: bool) -> None:
    remedy = "Choose another --output"
    for source in (Path(path).resolve() for path in inputs):
        if target == source or target in source.parents or source in target.parents:
            raise UserError(f"the input {source} and the output {target} contain each other", remedy)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file", remedy)
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise UserError(f"{target} exists and is not empty", f"{remedy}, or replace it with --overwrite")
        if not (target / "manifest.json").is_file():  # never delete what we did not make
            raise UserError(f"{target} is not a prepared directory, so it is not replaced", remedy)


def _publish(partial: Path, target: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
