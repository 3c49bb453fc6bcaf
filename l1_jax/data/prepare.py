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
from typing import Any, NamedTuple

from rich.progress import Progress

from l1_jax.console import console, log
from l1_jax.data.byte_level import MIN_VOCAB_SIZE, ByteLevel
from l1_jax.data.cleaning import Ledger, clean
from l1_jax.data.readers.documents import Open, find_files, read_documents
from l1_jax.data.store import MANIFEST_BYTES, MANIFEST_VERSION, SPLITS, hash_chain, write_tokens
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.data.tokenizer_kinds import open_tokenizer
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
_TOKENIZER = "tokenizer.json"
_NAMES = {_MANIFEST, _TOKENIZER, "tokens", *(f"{split}.txt" for split in SPLITS)}

# What a manifest of ours holds: others have files of that name, too.
_SIGN = '"hash_chain"'

# What rounding may add to the sum of two ratios.
_RATIO_SLACK = 1e-9

_BUFFER_BYTES = 1 << 20
_LENGTH_BYTES = 8

# By the link of the hash chain that they change.
Settings = dict[str, dict[str, Any]]


class _Workplace(NamedTuple):
    """Where a prepared directory is made.

    A mount point, such as a volume of a container, cannot be renamed, and is filled in place.
    """

    target: Path
    in_place: bool
    partial: Path  # what is not whole yet
    lock_file: Path


def prepare(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
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
    """Makes a prepared directory out of text files, whole or not at all.

    The arguments are the flags of scripts/prepare_data.py, which its help explains.

    Returns:
        The manifest.

    Raises:
        UserError: the input or a setting is wrong; nothing is left behind then.
    """
    if isinstance(inputs, str | Path):
        inputs = [inputs]

    _check_choice("`documents`", documents, ("line", "file"))
    _check_choice("`split`", split, ("random", "contiguous"))
    _check_ratios(train_ratio, val_ratio)
    paths = find_files(inputs)

    remote = Remote(str(output)) if is_url(output) else None
    if remote:
        target = scratch(remote.url) / "prepared"
        _check_remote(remote, overwrite)
    else:
        target = Path(os.path.realpath(output))

    _check_apart(inputs, target)
    check_writable(target if target.is_dir() else target.parent, "`output`")

    given = None
    if tokenizer != "bpe":
        given = ByteLevel.bytes_only() if tokenizer == "bytes" else open_tokenizer(tokenizer)

    least_vocab_size = given.vocab_size if given else MIN_VOCAB_SIZE
    _check_number("`vocab_size`", vocab_size, least_vocab_size, 2**24)
    _check_number("`seed`", seed, 0, 2**32 - 1)

    settings = {
        "cleaning": {"documents": documents, "dedup": dedup},
        "split": {"split": split, "train_ratio": train_ratio, "val_ratio": val_ratio, "seed": seed},
        "tokenizer": {"tokenizer": str(tokenizer), "vocab_size": vocab_size},
    }

    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        place = _find_workplace(target)
        what = f"{target} is being prepared"
        remedy = "Wait until that has ended, or choose another `output`"

        with lock(place.lock_file, what, remedy):
            _clear(place, overwrite)
            try:
                (place.partial / "tokens").mkdir(parents=True)
                manifest = _build(place.partial, paths, settings, given)
                text = json.dumps(manifest, indent=1) + "\n"
                (place.partial / _MANIFEST).write_text(text)
                _publish(place)
            finally:
                delete(place.partial)

        if remote:
            remote.delete()
            # The tokenizer first: by it `_check_remote` knows an upload that we did not finish.
            remote.upload(target, _TOKENIZER)
            remote.upload(target)
    finally:
        for parent in made:
            # Not empty: we did not fail.
            with suppress(OSError):
                parent.rmdir()

    return manifest


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}", f"Give {' or '.join(choices)}")


def _check_ratios(train_ratio: float, val_ratio: float) -> None:
    for name, ratio in (("`train_ratio`", train_ratio), ("`val_ratio`", val_ratio)):
        if not isinstance(ratio, int | float):
            raise UserError(f"{name} is {ratio!r}", "Give a number between 0 and 1")

    is_sum_legal = train_ratio + val_ratio <= 1 + _RATIO_SLACK
    if train_ratio > 0 and val_ratio >= 0 and is_sum_legal:
        return

    what = f"`train_ratio` {train_ratio} and `val_ratio` {val_ratio} do not divide the text"
    raise UserError(what, "Give ratios between 0 and 1 whose sum is at most 1, the first above 0")


def _check_number(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise UserError(f"{name} is {value}", f"Give a number from {least} to {most}")


def _check_apart(inputs: Sequence[str | Path], target: Path) -> None:
    for path in inputs:
        source = Path(path).resolve()
        if target == source or target in source.parents or source in target.parents:
            what = f"the input {source} and the output {target} contain each other"
            raise UserError(what, "Choose another `output`")


def _check_remote(remote: Remote, overwrite: bool) -> None:
    names = remote.entries().keys()
    manifest = remote.read_text(_MANIFEST) if _MANIFEST in names else None

    # Without a manifest it is an upload that we did not finish: the tokenizer comes first.
    has_our_sign = _SIGN in manifest if manifest else _TOKENIZER in names
    is_ours = names <= _NAMES and has_our_sign

    if names and not (overwrite and is_ours):
        raise _in_the_way(remote.url, overwrite)


def _check_free(target: Path, overwrite: bool, passed_over: Collection[str]) -> None:
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    names.difference_update(passed_over)

    is_there = os.path.lexists(target)
    if not names and (target.is_dir() or not is_there):
        return

    # Never delete what we did not make.
    is_ours = False
    if _MANIFEST in names and names <= _NAMES:
        is_ours = _SIGN in read_text(target / _MANIFEST, MANIFEST_BYTES)

    if not (overwrite and is_ours):
        raise _in_the_way(target, overwrite)


def _in_the_way(place: str | Path, overwrite: bool) -> UserError:
    if overwrite:
        what = f"{place} is in the way, and not prepared data alone"
        return UserError(what, "Choose another `output`")

    remedy = "Choose another `output`, or `overwrite` if it is prepared data"
    return UserError(f"{place} is in the way", remedy)


def _find_workplace(target: Path) -> _Workplace:
    in_place = target.is_dir() and not can_be_renamed(target)
    hidden = target / ".prepared" if in_place else target.with_name(f".{target.name}")
    return _Workplace(
        target=target,
        in_place=in_place,
        partial=hidden.with_name(f"{hidden.name}.partial"),
        lock_file=hidden.with_name(f"{hidden.name}.lock"),
    )


def _clear(place: _Workplace, overwrite: bool) -> None:
    """Finishes or deletes what a call that was killed has left.

    UserError where something else is in the way.
    """
    finish_fill(place.partial, place.target, last=_MANIFEST)
    if not place.in_place:
        recover(place.target)
    delete(place.partial)

    # What we leave in it while we work there, and what a disk of its own has.
    passed_over = {place.lock_file.name, "lost+found"} if place.in_place else set()
    _check_free(place.target, overwrite, passed_over)


def _publish(place: _Workplace) -> None:
    if not place.in_place:
        try:
            replace(place.partial, place.target)
        except OSError as error:
            # A directory of a container's image, which its file system lets nobody rename.
            if error.errno != errno.EXDEV:
                raise
        else:
            return

    fill(place.partial, place.target, last=_MANIFEST)


def _build(
    directory: Path, paths: list[Path], settings: Settings, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Fills the directory, and returns its manifest.

    Args:
        directory: empty, but for the directory `tokens`.
        paths: of the corpus.
        settings: as in the manifest.
        tokenizer: None has one trained on the training split.
    """
    texts = {name: directory / f"{name}.txt" for name in SPLITS}
    stores = {name: directory / "tokens" / f"{name}.bin" for name in SPLITS}
    separator = b"\n" if settings["cleaning"]["documents"] == "line" else b""
    ledger = Ledger()

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        # Where a contiguous split ends is known only when all text was measured.
        passes = 2 if settings["split"]["split"] == "contiguous" else 1
        open_file = _watch(progress, "reading", paths, passes)
        assigned = _assign(paths, settings, ledger, open_file)
        counts = _write_splits(directory, assigned, separator)
        _check_splits(ledger, counts)

        if tokenizer is None:
            open_file = _watch(progress, "training the tokenizer", [texts["train"]])
            documents = _read_split(texts["train"], separator, open_file)
            tokenizer = _train_tokenizer(documents, settings["tokenizer"]["vocab_size"])
        tokenizer.save(directory / _TOKENIZER)

        open_file = _watch(progress, "encoding", list(texts.values()))
        for name, text in texts.items():
            documents = _read_split(text, separator, open_file)
            counts[name]["tokens"] = write_tokens(stores[name], documents, tokenizer)
            text.with_suffix(".lengths").unlink()

    corpus = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in paths
    ]
    vocabulary = {
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer_sha256": tokenizer.sha256,
    }
    dtype = {"dtype": tokenizer.dtype.str}
    links: dict[str, Any] = {
        "raw": corpus,
        "cleaning": settings["cleaning"],
        "split": settings["split"] | _hashes(texts.values()),
        "tokenizer": vocabulary,
        "tokens": dtype | _hashes(stores.values()),
    }
    return {
        "version": MANIFEST_VERSION,
        "settings": settings["cleaning"] | settings["split"] | settings["tokenizer"],
        "ledger": vars(ledger),
        "splits": counts,
        **vocabulary,
        **dtype,
        "hash_chain": hash_chain(links),
    }


def _watch(progress: Progress, stage: str, paths: list[Path], passes: int = 1) -> Open:
    """Opens files so that what is read of them moves the progress bar of a stage.

    Args:
        progress: gets the bar.
        stage: its name.
        paths: all the files that the stage reads.
        passes: how often it reads them.
    """
    num_bytes = passes * sum(path.stat().st_size for path in paths)
    task = progress.add_task(stage, total=num_bytes)

    def open_file(path: Path) -> Any:
        return progress.open(path, "rb", buffering=0, total=num_bytes, task_id=task)

    return open_file


def _check_splits(ledger: Ledger, counts: dict[str, Any]) -> None:
    if not ledger.kept:
        what = "the input has no text: nothing was left of it"
        raise UserError(what, "Give files with text in them")

    if not counts["train"]["documents"]:
        what = f"the training split is empty: {ledger.kept} documents are too few"
        raise UserError(what, "Give more text, a larger `train_ratio`, or `split` contiguous")

    if not counts["val"]["documents"]:
        log.warning("the validation split is empty: training will skip validation")


def _train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = ByteLevel.train(documents, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        log.info(
            "the corpus gives %d tokens of the %d asked for: these will do",
            tokenizer.vocab_size,
            vocab_size,
        )
    return tokenizer


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: hash_file(path) for path in paths}


def _assign(
    paths: list[Path], settings: Settings, ledger: Ledger, open_file: Open
) -> Iterator[tuple[str, str]]:
    """(split, document) of everything that is kept."""
    mode = settings["cleaning"]["documents"]
    dedup = settings["cleaning"]["dedup"]
    split = settings["split"]

    def read(counted: Ledger) -> Iterator[str]:
        documents = read_documents(paths, mode, counted.drop, open_file)
        return clean(documents, counted, dedup)

    # As exact decimals: 0.7 + 0.2 as floats is below 0.9, and a cut must not be off by one for
    # that.
    train_end = Fraction(str(split["train_ratio"]))
    val_end = train_end + Fraction(str(split["val_ratio"]))
    ends = [train_end, val_end]

    if split["split"] == "random":
        return split_random(read(ledger), ends, split["seed"])

    # The first pass measures the text that is kept; its ledger is thrown away.
    num_bytes = sum(len(text.encode()) for text in read(Ledger()))
    cuts = [int(num_bytes * end) for end in ends]
    return split_contiguous(read(ledger), cuts, cut_documents=mode == "file")


def split_random(
    documents: Iterable[str], ends: Sequence[Fraction], seed: int
) -> Iterator[tuple[str, str]]:
    """(split, document) by the text and the seed alone.

    Args:
        documents: in any order.
        ends: of training and of validation, as parts of 1.
        seed: another one gives other splits.
    """
    thresholds = [int(end * 2**64) for end in ends]
    key = str(seed).encode()

    for text in documents:
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        draw = int.from_bytes(digest, "big")
        yield SPLITS[bisect.bisect_right(thresholds, draw)], text


def split_contiguous(
    documents: Iterable[str], cuts: Sequence[int], cut_documents: bool
) -> Iterator[tuple[str, str]]:
    """(split, document) by position.

    Args:
        documents: in order.
        cuts: where training and validation end, in bytes of text from the start.
        cut_documents: a split may end inside a document, before the character that the cut falls
            in. Else it ends at the first document that starts at the cut or later.
    """
    start = 0
    for text in documents:
        data = text.encode()
        if cut_documents:
            cuts_inside = [max(cut - start, 0) for cut in cuts]
            yield from _cut_document(text, data, cuts_inside)
        else:
            yield SPLITS[bisect.bisect_right(cuts, start)], text
        start += len(data)


def _cut_document(text: str, data: bytes, cuts: Sequence[int]) -> Iterator[tuple[str, str]]:
    """(split, part) of a document, cut at so many bytes; empty parts are left out."""
    # What is left of a character that a cut falls in is ignored.
    before = [data[:cut].decode(errors="ignore") for cut in cuts]
    bounds = [0, *map(len, before), len(text)]

    for name, (begin, end) in zip(SPLITS, pairwise(bounds), strict=True):
        if end > begin:
            yield name, text[begin:end]


def _write_splits(
    directory: Path, assigned: Iterable[tuple[str, str]], separator: bytes
) -> dict[str, Any]:
    """Writes <split>.txt and, as a document may hold separators, their lengths beside it.

    Returns:
        The counts of each split.
    """
    counts = {name: {"documents": 0, "tokens": 0, "bytes": 0} for name in SPLITS}

    with ExitStack() as stack:
        texts = {}
        lengths = {}
        for name in SPLITS:
            texts[name] = stack.enter_context(open(directory / f"{name}.txt", "wb"))
            lengths[name] = stack.enter_context(open(directory / f"{name}.lengths", "wb"))

        for name, document in assigned:
            data = document.encode()
            texts[name].write(data + separator)
            lengths[name].write(len(data).to_bytes(_LENGTH_BYTES, "little"))

            counts[name]["documents"] += 1
            counts[name]["bytes"] += len(data)

    return counts


def _read_split(path: Path, separator: bytes, open_file: Open) -> Iterator[str]:
    with (
        io.BufferedReader(open_file(path), _BUFFER_BYTES) as text,
        open(path.with_suffix(".lengths"), "rb") as lengths,
    ):
        while length := lengths.read(_LENGTH_BYTES):
            num_bytes = int.from_bytes(length, "little")
            yield text.read(num_bytes).decode()
            text.read(len(separator))
