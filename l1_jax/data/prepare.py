"""The one pipeline: corpus -> cleaning -> split -> tokenizer -> token store."""

import bisect
import errno
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.progress import Progress

from l1_jax.console import console, log
from l1_jax.data.cleaning import Ledger, clean
from l1_jax.data.readers.documents import Open, find_files, read_documents
from l1_jax.data.store import MANIFEST_BYTES, MANIFEST_VERSION, SPLITS, hash_chain, write_tokens
from l1_jax.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from l1_jax.errors import UserError, check_writable
from l1_jax.storage.files import (
    can_be_renamed,
    delete,
    fill,
    finish_fill,
    hash_file,
    read_text,
    recover,
    replace,
)
from l1_jax.storage.lock import lock
from l1_jax.storage.remote import Remote, is_url, scratch

_MANIFEST = "manifest.json"
_NAMES = {_MANIFEST, "tokenizer.json", "tokens", *(f"{split}.txt" for split in SPLITS)}
Settings = dict[str, dict[str, Any]]  # by the link of the hash chain that they change


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int = 50257,
    train_ratio: float = 0.8,
    val_ratio: float = 0.1,
    seed: int = 42,
    documents: str = "line",
    split: str = "random",
    tokenizer: str = "bpe",
    dedup: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a prepared directory out of text files, whole or not at all, and returns its manifest.

    The arguments are the flags of the command `prepare_data`, whose help explains them. UserError
    where the input or a setting is wrong; nothing is left behind then.
    """
    if not (train_ratio > 0 and val_ratio >= 0 and train_ratio + val_ratio <= 1 + 1e-9):
        what = (
            f"training ratio {train_ratio} and validation ratio {val_ratio} do not divide the text"
        )
        raise UserError(
            what, "Give ratios between 0 and 1 whose sum is at most 1, the first above 0"
        )
    paths = find_files(inputs)
    remote = Remote(str(output)) if is_url(output) else None
    target = scratch(remote.url) / "prepared" if remote else Path(os.path.realpath(output))
    if remote:
        _check_remote(remote, overwrite)
    for source in (Path(path).resolve() for path in inputs):
        if target == source or target in source.parents or source in target.parents:
            raise UserError(
                f"the input {source} and the output {target} contain each other",
                "Choose another `output`",
            )
    check_writable(target if target.is_dir() else target.parent, "`output`")
    given = None
    if tokenizer != "bpe":
        given = Tokenizer.bytes_only() if tokenizer == "bytes" else Tokenizer.load(tokenizer)
    needed = given.vocab_size if given else MIN_VOCAB_SIZE
    for name, value, least, most in (
        ("`vocab_size`", vocab_size, needed, 2**24),
        ("`seed`", seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} is {value}", f"Give a number from {least} to {most}")
    settings = {
        "cleaning": {"documents": documents, "dedup": dedup},
        "split": {"split": split, "train_ratio": train_ratio, "val_ratio": val_ratio, "seed": seed},
        "tokenizer": {"tokenizer": str(tokenizer), "vocab_size": vocab_size},
    }
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)

    # A mount point, such as a volume of a container, cannot be renamed, and is filled in place.
    in_place = target.is_dir() and not can_be_renamed(target)
    hidden = target / ".prepared" if in_place else target.with_name(f".{target.name}")
    partial = hidden.with_name(f"{hidden.name}.partial")
    lock_file = hidden.with_name(f"{hidden.name}.lock")
    # What we leave in it while we work there, and what a disk of its own has.
    passed_over = {lock_file.name, "lost+found"} if in_place else set()

    busy = f"{target} is being prepared", "Wait until that has ended, or choose another `output`"
    try:
        with lock(lock_file, *busy):
            finish_fill(partial, target, last=_MANIFEST)
            if not in_place:
                recover(target)
            delete(partial)  # of a call that was killed
            _check_free(target, overwrite, passed_over)
            try:
                (partial / "tokens").mkdir(parents=True)
                manifest = _build(partial, paths, settings, given)
                (partial / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
                _publish(partial, target, in_place)
            finally:
                delete(partial)
        if remote:
            remote.delete()
            remote.upload(
                target, "tokenizer.json"
            )  # by it `_check_remote` knows what we did not finish
            remote.upload(target)
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: we did not fail
                parent.rmdir()
    return manifest


def _publish(partial: Path, target: Path, in_place: bool) -> None:
    if not in_place:
        try:
            replace(partial, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return

    # In place, or a directory of a container's image, which its file system lets nobody rename.
    fill(partial, target, last=_MANIFEST)


def _check_free(target: Path, overwrite: bool, passed_over: Collection[str]) -> None:
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    names.difference_update(passed_over)
    is_ours = "manifest.json" in names <= _NAMES
    is_ours = is_ours and '"hash_chain"' in read_text(target / "manifest.json", MANIFEST_BYTES)
    is_free = not names and (target.is_dir() or not os.path.lexists(target))
    if not is_free and not (overwrite and is_ours):  # never delete what we did not make
        raise UserError(
            f"{target} is in the way",
            "Choose another `output`, or `overwrite` if it is prepared data",
        )


def _check_remote(remote: Remote, overwrite: bool) -> None:
    names = remote.entries().keys()
    manifest = remote.read_text("manifest.json") if "manifest.json" in names else None
    is_ours = names <= _NAMES and (
        '"hash_chain"' in manifest if manifest else "tokenizer.json" in names
    )
    if names and not (overwrite and is_ours):
        raise UserError(
            f"{remote.url} is in the way",
            "Choose another `output`, or `overwrite` if it is prepared data",
        )


def _build(
    directory: Path, paths: list[Path], settings: Settings, tok: Tokenizer | None
) -> dict[str, Any]:
    """Fills the directory, and returns its manifest."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def watch(stage: str, watched: list[Path], passes: int = 1) -> Open:
            total = passes * sum(path.stat().st_size for path in watched)
            task = progress.add_task(stage, total=total)
            return lambda path: progress.open(path, "rb", buffering=0, total=total, task_id=task)

        passes = 2 if settings["split"]["split"] == "contiguous" else 1
        separator = b"\n" if settings["cleaning"]["documents"] == "line" else b""
        ledger = Ledger()
        counts = _write_splits(
            directory, _assign(paths, settings, ledger, watch("reading", paths, passes)), separator
        )
        if not ledger.kept:
            raise UserError(
                "the input has no text: nothing was left of it", "Give files with text in them"
            )
        if not counts["train"]["documents"]:
            what = f"the training split is empty: {ledger.kept} documents are too few"
            raise UserError(what, "Give more text, a larger `train_ratio`, or `split` contiguous")
        if not counts["val"]["documents"]:
            log.warning("the validation split is empty: training will skip validation")
        texts = {name: directory / f"{name}.txt" for name in SPLITS}
        if tok is None:
            train, wanted = texts["train"], settings["tokenizer"]["vocab_size"]
            tok = Tokenizer.train(
                _read_split(train, separator, watch("training the tokenizer", [train])), wanted
            )
            if tok.vocab_size < wanted:
                log.info(
                    "the corpus gives %d tokens of the %d asked for: these will do",
                    tok.vocab_size,
                    wanted,
                )
        tok.save(directory / "tokenizer.json")
        encoding = watch("encoding", list(texts.values()))
        stores = {name: directory / "tokens" / f"{name}.bin" for name in SPLITS}
        for name, text in texts.items():
            counts[name]["tokens"] = write_tokens(
                stores[name], _read_split(text, separator, encoding), tok
            )
            text.with_suffix(".lengths").unlink()

    links: dict[str, Any] = {
        "raw": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in paths
        ],
        "cleaning": settings["cleaning"],
        "split": settings["split"] | {text.name: hash_file(text) for text in texts.values()},
        "tokenizer": {
            "vocab_size": tok.vocab_size,
            "eot_id": tok.eot_id,
            "tokenizer_sha256": tok.sha256,
        },
        "tokens": {"dtype": tok.dtype.str}
        | {store.name: hash_file(store) for store in stores.values()},
    }
    return {
        "version": MANIFEST_VERSION,
        "settings": settings["cleaning"] | settings["split"] | settings["tokenizer"],
        "ledger": vars(ledger),
        "splits": counts,
        **links["tokenizer"],
        "dtype": tok.dtype.str,
        "hash_chain": hash_chain(links),
    }


def _assign(
    paths: list[Path], settings: Settings, ledger: Ledger, open_file: Open
) -> Iterator[tuple[str, str]]:
    """(split, document) of everything that is kept."""
    mode, split = settings["cleaning"]["documents"], settings["split"]

    def kept(counted: Ledger) -> Iterator[str]:
        return clean(
            read_documents(paths, mode, counted.drop, open_file),
            counted,
            settings["cleaning"]["dedup"],
        )

    # As exact decimals: 0.7 + 0.2 as floats is below 0.9, and a cut must not be off by one for
    # that.
    train_end = Fraction(str(split["train_ratio"]))
    ends = [train_end, train_end + Fraction(str(split["val_ratio"]))]
    if split["split"] == "random":
        return split_random(kept(ledger), ends, split["seed"])
    total = sum(len(text.encode()) for text in kept(Ledger()))
    return split_contiguous(
        kept(ledger), [int(total * end) for end in ends], cut_documents=mode == "file"
    )


def split_random(
    documents: Iterable[str], ends: Sequence[Fraction], seed: int
) -> Iterator[tuple[str, str]]:
    """(split, document) by the text and the seed alone; training and validation end at `ends`,
    parts of 1."""
    thresholds = [int(end * 2**64) for end in ends]
    for text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
        yield SPLITS[bisect.bisect_right(thresholds, int.from_bytes(digest, "big"))], text


def split_contiguous(
    documents: Iterable[str], cuts: Sequence[int], cut_documents: bool
) -> Iterator[tuple[str, str]]:
    """(split, document) by position: training and validation end `cuts` bytes of text from the
    start, if need be inside a document (before the character that the cut falls in) or else at the
    first that starts there or later."""
    start = 0
    for text in documents:
        data = text.encode()
        if cut_documents:
            before = [data[: max(cut - start, 0)].decode(errors="ignore") for cut in cuts]
            for name, (begin, end) in zip(
                SPLITS, pairwise([0, *map(len, before), len(text)]), strict=True
            ):
                if end > begin:
                    yield name, text[begin:end]
        else:
            yield SPLITS[bisect.bisect_right(cuts, start)], text
        start += len(data)


def _write_splits(
    directory: Path, assigned: Iterable[tuple[str, str]], separator: bytes
) -> dict[str, Any]:
    """Writes <split>.txt and, as a document may hold separators, their lengths beside it; returns
    the counts."""
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}
    with ExitStack() as stack:
        texts = {
            name: stack.enter_context(open(directory / f"{name}.txt", "wb")) for name in SPLITS
        }
        lengths = {
            name: stack.enter_context(open(directory / f"{name}.lengths", "wb")) for name in SPLITS
        }
        for name, document in assigned:
            data = document.encode()
            texts[name].write(data + separator)
            lengths[name].write(len(data).to_bytes(8, "little"))
            counts[name]["documents"] += 1
            counts[name]["bytes"] += len(data)
    return counts


def _read_split(path: Path, separator: bytes, open_file: Open) -> Iterator[str]:
    with (
        io.BufferedReader(open_file(path), 1 << 20) as text,
        open(path.with_suffix(".lengths"), "rb") as lengths,
    ):
        while length := lengths.read(8):
            yield text.read(int.from_bytes(length, "little")).decode()
            text.read(len(separator))
