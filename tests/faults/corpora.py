"""Generated corpora: every drop is counted, the tokens give the kept text back, none is special, the time is linear."""

import contextlib
import gzip
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from faults import Row
from l1_jax.data.byte_level import END_OF_TEXT, ByteLevel
from l1_jax.data.prepare import prepare
from l1_jax.data.store import SPLITS, Prepared
from l1_jax.data.tokenizer_kinds import open_tokenizer
from l1_jax.errors import UserError

SEED, FULL, QUICK = 7, 2000, 200
SPECIAL = [
    END_OF_TEXT, END_OF_TEXT.upper(), f"a{END_OF_TEXT}b", f" {END_OF_TEXT} ", END_OF_TEXT * 3,
    END_OF_TEXT[:-1], "<|end\u200boftext|>", f"<|endoftext{END_OF_TEXT}|>", "<|im_start|>", "<|pad|>", "[CLS]",
    "[MASK]", "<s>", "</s>", "<unk>", "<pad>", "<0x0A>", "Ġ", "ĊĊ", "&lt;|endoftext|&gt;", "\\u003c|endoftext|\\u003e",
]  # fmt: skip
TEXTS = [
    "a plain line", "Ünïcödé", "漢字かな交じり文。", "العربية من اليمين",
    "\u202eright to left\u202c", "e\u0301\u0301\u0301",
    "👩\u200d👩\u200d👧", "\U0010ffff",
    "\u2028", "\u2029", "\u0085", "\x0b\x0c", "\x1c\x1d", "\x00", "a\x00b", "\x7f\x1b[31m", "\ufeff", "\ufffe\uffff",
    "\u200b", "\u3000", " ", "\t", "  a  ",
    "", "", "'s 't 're", "1234567890", "...!!!", "x" * 5000, " " * 3000, "word " * 900, "\u00a0",
    "{\"text\": \"x\"}", "null", "//",
]  # fmt: skip
BROKEN = [
    b"\xff",
    b"\xfe\xe9t\xe9",
    b"\xc3",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\x80",
    b"ok \xe2\x82",
    b"\xf8\x88\x80\x80\x80",
]
ENDS = [
    b"\n",
    b"\n",
    b"\n",
    b"\r\n",
    b"\r",
    b"\n\n",
    b"\n\r",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
]  # the last two end no line
RECORDS: list[Any] = [
    {"text": 1},
    {"text": None},
    {"txt": "x"},
    [],
    5,
    "text",
    {"text": ["x"]},
    {"text": "\ud800"},
    {"text": "a\r\nb\rc"},
]


def _text(rng: random.Random) -> str:
    return rng.choice(
        [
            rng.choice(TEXTS),
            rng.choice(SPECIAL),
            "".join(rng.choices(TEXTS[:20] + SPECIAL, k=rng.randrange(1, 6))),
        ]
    )


def _content(rng: random.Random, is_jsonl: bool) -> bytes:
    """The bytes of a file: mostly text, with broken lines in some files, in a few more than half of them."""
    bad, lines = rng.choice([0, 0, 0, 0, 0.1, 0.1, 0.3, 0.7]), []
    for _ in range(rng.choice([0, 1, 2, 5, 12, 40])):
        if is_jsonl:
            record = (
                rng.choice(RECORDS)
                if rng.random() < bad
                else {"text": _text(rng), "id": rng.randrange(9)}
            )
            lines.append(
                json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
            )
        else:
            lines.append(rng.choice(BROKEN) if rng.random() < bad else _text(rng).encode())
        if rng.random() < 0.1:
            lines.append(lines[-1])
    content = b"".join(line + rng.choice(ENDS) for line in lines)
    content = content[:-1] if rng.random() < 0.3 else content
    prefix = rng.choice(
        [b""] * 60 + [b"\xef\xbb\xbf", b"\xef\xbb\xbf\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"]
    )
    return (
        prefix + content
        if rng.random() < 0.97
        else rng.choice([b"\n" * 50, b" \t\r\n" * 9, bytes(256), rng.randbytes(300)])
    )


class Expected(NamedTuple):
    """What the ledger and the documents of some files must be; `documents` is None where a file is to be refused."""

    documents: list[str] | None
    read: int
    dropped: Counter[str]


def expect(files: list[tuple[str, bytes]], mode: str, dedup: bool) -> Expected:
    """The policy of docs/data.md once more, as bytes and in memory, to compare the pipeline with."""
    documents: list[str] = []
    dropped, lost, refused = Counter[str](), 0, False
    for name, content in files:
        is_jsonl, broken, broken_chars = name.endswith(".jsonl"), 0, 0
        refused |= content[:2] in (b"\xff\xfe", b"\xfe\xff") or content[:4] == b"\x00\x00\xfe\xff"
        body = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = [line + b"\n" for line in body.split(b"\n")]
        lines[-1:] = [lines[-1][:-1]] if lines[-1] != b"\n" else []
        kept = []
        for line in lines:
            try:
                text = line.decode()
                kept.append(_record(text) if is_jsonl else text)
            except (ValueError, TypeError, KeyError) as error:
                reason = "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"
                dropped[reason] += 1
                lost += mode == "line" or is_jsonl
                broken, broken_chars = (
                    broken + 1,
                    broken_chars + len(line.decode(errors="surrogateescape")),
                )
        refused |= 2 * broken > len(lines) or 2 * broken_chars > len(
            body.decode(errors="surrogateescape")
        )
        if is_jsonl:
            documents += kept
        else:
            documents += (
                ["".join(kept)] if mode == "file" else [text.removesuffix("\n") for text in kept]
            )
    found: dict[str, None] | list[str] = {} if dedup else []
    read = len(documents) + lost
    unique: list[str] = []
    for text in documents:
        if not text.strip():
            dropped["blank"] += 1
        elif dedup and text in found:
            dropped["duplicate"] += 1
        else:
            unique.append(text)
            if isinstance(found, dict):
                found[text] = None
    return Expected(None if refused else unique, read, dropped)


def _record(line: str) -> str:
    text = json.loads(line)["text"] if line.strip() else ""
    if not isinstance(text, str):
        raise TypeError(text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(line) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(directory: Path) -> Iterator[tuple[str, list[str]]]:
    """The documents of each split by its tokens; AssertionError where the store and the texts beside it differ."""
    prepared = Prepared.open(directory)
    tokenizer = open_tokenizer(prepared.tokenizer_path)
    for split in SPLITS:
        tokens = prepared.store(split).tokens
        ends = np.flatnonzero(tokens == tokenizer.eot_id)
        assert len(ends) == prepared.manifest["splits"][split]["documents"] + 1, (
            f"{split}: a text gave an end of text"
        )
        parts = [
            b"".join(map(tokenizer.token_bytes, tokens[a + 1 : b].tolist()))
            for a, b in pairwise(ends)
        ]
        separator = b"\n" if prepared.documents_mode == "line" else b""
        assert (
            b"".join(part + separator for part in parts)
            == (directory / f"{split}.txt").read_bytes()
        )
        yield split, [part.decode() for part in parts]


def _one(rng: random.Random, home: Path, counts: Counter[str]) -> None:
    """Makes a corpus, prepares it, and compares what comes with `expect`."""
    shutil.rmtree(home, ignore_errors=True)
    raw = home / "raw"
    raw.mkdir(parents=True)
    files: list[tuple[str, bytes]] = []
    for number in range(rng.choice([1, 1, 2, 4])):
        name = rng.choice(
            [
                f"{number}.txt",
                f"{number}.jsonl",
                f"{number}",
                f"sub/{number}.md",
                f"{number} \n\u202e'.txt",
                f"{number}\udcff",
            ]
        )
        content = _content(rng, name.endswith(".jsonl"))
        path = raw / name
        path.parent.mkdir(exist_ok=True)
        if zipped := rng.random() < 0.1:
            path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(content, 1) if zipped else content)
        files.append((name, content))
    leaves = rng.random() < 0.05
    if leaves:
        (raw / "link.txt").symlink_to("/etc/hostname")
    os.symlink("nowhere", raw / ".hidden")
    order = {
        path.relative_to(raw).as_posix().removesuffix(".gz"): i
        for i, path in enumerate(sorted(raw.rglob("*")))
    }
    files.sort(key=lambda file: order[file[0]])
    mode, dedup, split = (
        rng.choice(["line", "line", "file"]),
        rng.random() < 0.8,
        rng.choice(["random", "contiguous"]),
    )
    tokenizer = "bpe" if rng.random() < 0.15 else "bytes"
    expected = expect(files, mode, dedup)
    how = {"documents": mode, "dedup": dedup, "split": split, "tokenizer": tokenizer}
    try:
        manifest = prepare([raw], home / "out", vocab_size=300, seed=rng.randrange(9), **how)
    except UserError as error:
        no_train = "training split is empty" in str(error)
        text, left = str(error), [path.name for path in home.iterdir()]
        allowed = leaves or not expected.documents or no_train
        if (
            not allowed
            or not text.isprintable()
            or leaves != ("by way of a link" in text)
            or left != ["raw"]
        ):
            raise AssertionError(f"{text}, and {left} is there") from error
        counts["refused"] += 1
        return
    assert not leaves
    assert expected.documents, "text was made of nothing"
    ledger = manifest["ledger"]
    assert ledger == {
        "read": expected.read,
        "kept": len(expected.documents),
        "dropped": dict(expected.dropped),
    }, (ledger, expected)
    whole = mode == "line" or not expected.dropped["not_utf8"]
    assert not whole or ledger["read"] == ledger["kept"] + sum(ledger["dropped"].values())
    read = [document for _, documents in _documents(home / "out") for document in documents]
    if mode == "file" and split == "contiguous":
        assert "".join(read) == "".join(expected.documents)
    else:
        assert sorted(read) == sorted(expected.documents)
    counts["prepared"] += 1
    counts["documents kept"] += ledger["kept"]
    counts["dropped"] += sum(ledger["dropped"].values())


def _prompts(rng: random.Random, total: int) -> Row:
    """Prompts that spell special tokens, through both kinds of tokenizer."""
    trained = ByteLevel.train(TEXTS + SPECIAL * 20, 400)
    bad = 0
    for number in range(total):
        tokenizer = trained if number % 2 else ByteLevel.bytes_only()
        prompt = "".join(rng.choice(SPECIAL + TEXTS) for _ in range(rng.randrange(1, 8)))
        ids = tokenizer.encode(prompt)
        bad += (
            tokenizer.eot_id in ids
            or max(ids, default=0) >= tokenizer.vocab_size
            or tokenizer.decode(ids) != prompt
        )
    return (
        "generated prompts",
        f"{total}: no special id, and the text comes back",
        f"{bad} failed",
        bad == 0,
    )


def _seconds(home: Path, content: bytes, tokenizer: str) -> float:
    """Of the processor, which other work on the machine does not change."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    (home / "a.txt").write_bytes(content)
    start = time.process_time()
    prepare(
        [home / "a.txt"],
        home / "out",
        vocab_size=300,
        train_ratio=1.0,
        val_ratio=0.0,
        seed=0,
        tokenizer=tokenizer,
    )
    return time.process_time() - start


def _times(home: Path, full: bool) -> Row:
    """Doubling a corpus doubles its time, also where it is one line of many megabytes. Quadratic would be x 4."""
    megabytes = [2.5, 5, 10] if full else [0.0625, 0.25]
    shapes = {
        "words": b"word and word ", "no space": b"abcdefg", "one letter": b"a", "blanks": b" " * 63 + b"x",
        "lines": b"a\n",
        "bad UTF-8": b"\xff", "CR alone": b"a\r", "special tokens": END_OF_TEXT.encode(), "ideographs": "漢字".encode(),
    }  # fmt: skip
    growth: dict[str, float] = {}
    for name, unit in shapes.items():
        for tokenizer in ("bytes", "bpe"):
            seconds = []
            for size in megabytes:
                body = unit * int(size * 2**20 / len(unit))
                end = (
                    b"\n" + b"l\n" * len(body) if unit == b"\xff" else b"\nlast\n"
                )  # more bad than good is refused
                seconds.append(_seconds(home, body + end, tokenizer))
            doublings = math.log2(megabytes[-1] / megabytes[0])
            growth[f"{name}, {tokenizer}: {seconds[-1]:.1f} s"] = (seconds[-1] / seconds[0]) ** (
                1 / doublings
            )
    worst, most = max(growth, key=growth.__getitem__), 2.5 if full else 3
    sizes = f"{megabytes[0]} to {megabytes[-1]} MB"
    bar = f"{len(growth)} kinds of one line of {sizes} (or as many short ones): x {most} at most for twice the size"
    return "long lines", bar, f"x {growth[worst]:.2f} at worst ({worst})", growth[worst] <= most


def campaign(full: bool) -> list[Row]:
    counts, bad = Counter[str](), list[str]()
    total = FULL if full else QUICK
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stderr(io.StringIO()):
        home = Path(temporary, "corpus")
        for number in range(total):
            try:
                _one(random.Random(f"{SEED}-{number}"), home, counts)
            except Exception as error:  # a campaign counts, and goes on
                bad.append(f"{number}: {type(error).__name__}: {str(error)[:600]!a}")
        rows = [_prompts(random.Random(SEED), total), _times(home, full)]
    for line in bad[:10]:
        print(line, file=sys.stderr)
    figure = (
        ", ".join(f"{count:,} {name}" for name, count in counts.items()) + f"; {len(bad)} failed"
    )
    bar = f"{total}: no traceback, the ledger counts every document, the tokens give the kept text back, none is special"
    is_met = not bad and counts["prepared"] > total // 3 and counts["refused"] > total // 20
    return [("generated corpora", bar, figure, is_met), *rows]
