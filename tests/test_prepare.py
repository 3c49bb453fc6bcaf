"""Text files -> a prepared directory, as a user asks for it."""

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from l1_jax.data import prepare as module
from l1_jax.data.byte_level import ByteLevel
from l1_jax.data.prepare import prepare, split_contiguous, split_random
from l1_jax.data.readers.documents import find_files, read_documents
from l1_jax.data.store import SPLITS, Prepared, tokenize_documents
from l1_jax.data.tokenizer_kinds import open_tokenizer
from l1_jax.errors import UserError
from l1_jax.storage.files import hash_file

ROOT = Path(__file__).resolve().parents[1]
SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
GUIDE = """The quick brown fox jumps over the lazy dog.
Artificial intelligence is transforming the world.
Large language models demonstrate emergent capabilities.
"""
DEFAULTS: dict[str, Any] = {"vocab_size": 300, "train_ratio": 0.8, "val_ratio": 0.1, "seed": 42}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "raw" / "text.txt"
    path.parent.mkdir()
    lines = [f"Line {i} of the corpus is naïve, 漢字 and short." for i in range(100)]
    path.write_text("\n".join([*lines, "", lines[3], "   "]) + "\n", encoding="utf-8")
    return path


def contents(directory):
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def documents_of(directory, split):
    """The documents of a store, by its end-of-text tokens, after a look at the counts and at the text."""
    prepared = Prepared.open(directory)
    store, tokenizer = prepared.store(split), open_tokenizer(prepared.tokenizer_path)
    counts, text = prepared.manifest["splits"][split], (directory / f"{split}.txt").read_bytes()
    ends = np.flatnonzero(store.tokens == tokenizer.eot_id)
    documents = [tokenizer.decode(store.tokens[a + 1 : b].tolist()) for a, b in pairwise(ends)]
    assert (ends[0], ends[-1] + 1, len(ends) - 1) == (0, counts["tokens"], counts["documents"])
    assert store.num_documents == counts["documents"]
    assert counts["bytes"] == sum(len(document.encode()) for document in documents)
    separator = "\n" if prepared.documents_mode == "line" else ""
    assert "".join(document + separator for document in documents).encode() == text
    return documents


@pytest.mark.parametrize("documents", ["line", "file"])
@pytest.mark.parametrize("split", ["random", "contiguous"])
def test_every_kept_document_is_in_one_split(tmp_path, corpus, documents, split):
    if documents == "file":
        for i in range(40):
            (corpus.parent / f"{i}.txt").write_text(f"File {i}\nwith é\n\n")
    manifest = prepare(
        [corpus.parent], tmp_path / "out", **DEFAULTS, documents=documents, split=split
    )
    read = [documents_of(tmp_path / "out", name) for name in SPLITS]
    assert all(read)
    kept = list(read_documents(find_files([corpus.parent]), documents, print))
    if documents == "line":
        kept = [line for line in dict.fromkeys(kept) if line.strip()]
        assert manifest["ledger"] == {
            "read": 103,
            "kept": 100,
            "dropped": {"blank": 2, "duplicate": 1},
        }
    if documents == "file" and split == "contiguous":
        assert "".join(chain(*read)) == "".join(kept)
    else:
        assert sorted(chain(*read)) == sorted(kept)
    assert {name: counts["documents"] for name, counts in manifest["splits"].items()} == dict(
        zip(SPLITS, map(len, read), strict=True)
    )


def test_the_stream_in_memory_is_the_stream_on_disk(tmp_path, corpus):
    prepare([corpus], tmp_path / "out", **DEFAULTS)
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (
        tokenizer.sha256 == ByteLevel.train(documents_of(tmp_path / "out", "train"), 300).sha256
    )  # and on no other
    for split in SPLITS:
        store = Prepared.open(tmp_path / "out").store(split)
        documents = read_documents(find_files([tmp_path / "out" / f"{split}.txt"]), "line", print)
        stream = tokenize_documents(documents, tokenizer)
        assert stream.dtype == store.tokens.dtype == np.uint16
        np.testing.assert_array_equal(stream, store.tokens)
        ids = [
            [tokenizer.eot_id, *tokenizer.encode(text)]
            for text in documents_of(tmp_path / "out", split)
        ]
        assert [*chain(*ids), tokenizer.eot_id] == stream.tolist()


def test_the_same_twice_and_the_chain_of_hashes(tmp_path, corpus):
    first = prepare([corpus], tmp_path / "a", **DEFAULTS)
    prepare([corpus], tmp_path / "b", **DEFAULTS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a")) == sorted(
        ["manifest.json", "tokenizer.json", *(f"{s}.txt" for s in SPLITS)]
        + [f"tokens/{s}.bin" for s in SPLITS]
    )

    def changed_from(**settings):
        manifest = prepare([corpus], tmp_path / "c", **DEFAULTS | settings, overwrite=True)
        pairs = zip(manifest["hash_chain"], first["hash_chain"], strict=True)
        return [ours["link"] for ours, theirs in pairs if ours["hash"] != theirs["hash"]]

    links = ["raw", "cleaning", "split", "tokenizer", "tokens"]
    assert changed_from() == []
    assert changed_from(vocab_size=301) == changed_from(tokenizer="bytes") == links[3:]
    assert changed_from(seed=1) == changed_from(split="contiguous") == links[2:]
    assert changed_from(dedup=False) == links[1:]
    assert Prepared.open(tmp_path / "c").manifest["ledger"]["kept"] == first["ledger"]["kept"] + 1
    assert Prepared.open(tmp_path / "a").data_hash == first["hash_chain"][-1]["hash"]
    corpus.write_text(corpus.read_text() + " ")  # changes nothing but the raw bytes
    assert changed_from() == links


def test_adding_data_moves_nothing_between_splits():
    ends = [Fraction(8, 10), Fraction(9, 10)]
    few = {text: split for split, text in split_random(map(str, range(2000)), ends, 1)}
    more = {text: split for split, text in split_random(map(str, reversed(range(5000))), ends, 1)}
    assert few.items() <= more.items()
    other = {text: split for split, text in split_random(few, ends, 2)}
    assert other != few
    shares = [list(more.values()).count(split) / 5000 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_contiguous_cuts():
    assert list(split_contiguous(["aéb", "cd"], [2, 5], True)) == [
        ("train", "a"), ("val", "éb"), ("val", "c"), ("test", "d")
    ]  # fmt: skip
    assert list(split_contiguous(["aéb", "cd"], [2, 5], False)) == [("train", "aéb"), ("val", "cd")]
    assert list(split_contiguous(["abcdef"], [2, 4], True)) == [
        ("train", "ab"),
        ("val", "cd"),
        ("test", "ef"),
    ]


def test_ratios_are_decimals(tmp_path):
    """0.7 + 0.2 in floats is below 0.9, whose cut of 10 bytes would be 8."""
    (tmp_path / "ten.txt").write_text("0123456789")
    settings: dict[str, Any] = {"documents": "file", "split": "contiguous", "tokenizer": "bytes"}
    prepare(
        [tmp_path / "ten.txt"],
        tmp_path / "out",
        **DEFAULTS | {"train_ratio": 0.7, "val_ratio": 0.2},
        **settings,
    )
    assert [(tmp_path / "out" / f"{split}.txt").read_text() for split in SPLITS] == [
        "0123456",
        "78",
        "9",
    ]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason=f"{SHAKESPEARE} is not here")
def test_tinyshakespeare_as_nanogpt_splits_it(tmp_path):
    settings = DEFAULTS | {"documents": "file", "split": "contiguous", "tokenizer": "bytes"}
    prepare([SHAKESPEARE], tmp_path / "out", **settings | {"train_ratio": 0.9, "val_ratio": 0.1})
    raw = SHAKESPEARE.read_bytes()
    assert (tmp_path / "out" / "train.txt").read_bytes() == raw[:1003854]
    assert (tmp_path / "out" / "val.txt").read_bytes() == raw[1003854:]
    tokenizer = open_tokenizer(tmp_path / "out" / "tokenizer.json")
    byte_of = np.array([next(iter(tokenizer.token_bytes(i)), 0) for i in range(257)], np.uint8)
    prepared = Prepared.open(tmp_path / "out")
    assert byte_of[prepared.store("val").tokens[1:-1]].tobytes() == raw[1003854:]
    assert prepared.manifest["splits"]["val"]["bytes"] == 111540
    assert prepared.store("test").tokens.tolist() == [tokenizer.eot_id]


def test_the_guides_example(tmp_path):
    """Its three lines leave the validation split empty, which is a warning; as a user runs it."""
    (tmp_path / "your_text.txt").write_text(GUIDE)
    flags = "--input your_text.txt --output processed/ --vocab-size 50257 --train-ratio 0.8 --val-ratio 0.1 --seed 42"
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), *flags.split(), "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest == Prepared.open(tmp_path / "processed").manifest
    assert [manifest["splits"][split]["documents"] for split in SPLITS] == [2, 0, 1]
    assert "the validation split is empty" in done.stderr
    assert f"{manifest['vocab_size']} tokens of the 50257 asked for" in done.stderr
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("error: ")
    assert "--overwrite" in again.stderr


def test_text_that_spells_the_end_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b\n")
    prepare([tmp_path / "a.txt"], tmp_path / "out", **DEFAULTS | {"train_ratio": 1, "val_ratio": 0})
    assert documents_of(tmp_path / "out", "train") == ["a<|endoftext|>b"]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a", {"train_ratio": 0.8, "val_ratio": 0.3}, "do not divide the text"),
        ("a", {"train_ratio": 0}, "do not divide the text"),
        ("a", {"train_ratio": float("nan")}, "do not divide the text"),
        ("a", {"val_ratio": -0.1}, "do not divide the text"),
        ("a", {"vocab_size": 256}, "`vocab_size` is 256. Give a number from 257 to 16777216"),
        ("a", {"vocab_size": 256, "tokenizer": "bytes"}, "`vocab_size` is 256"),
        ("a", {"vocab_size": 10**20}, "`vocab_size` is 1000"),
        ("a", {"seed": 2**32}, "`seed` is 4294967296. Give a number from 0 to 4294967295"),
        ("a", {"tokenizer": "absent.json"}, "absent.json does not exist"),
        (" \n\t\n", {}, "has no text"),
        ("a", {"train_ratio": 1e-6}, "training split is empty"),
        (b"a\n\xff\n\xfe\n", {}, "not UTF-8"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, text, settings, message):
    (tmp_path / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        prepare([tmp_path / "a.txt"], tmp_path / "out", **DEFAULTS | settings)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_output(tmp_path, corpus, monkeypatch):
    prepare([corpus], tmp_path / "out", **DEFAULTS)
    before = contents(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module, "hash_file", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare([corpus], tmp_path / "out", **DEFAULTS, overwrite=True)
    assert contents(tmp_path) == before


def test_where_output_may_go(tmp_path, corpus):
    def attempt(output, message, **settings):
        before = contents(tmp_path)
        with pytest.raises(UserError, match=message):
            prepare([corpus.parent], output, **DEFAULTS, **settings)
        assert contents(tmp_path) == before

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("precious")
    attempt(tmp_path, "contain each other", overwrite=True)
    attempt(corpus.parent / "out", "contain each other")
    attempt(tmp_path / "mine", "is in the way")
    attempt(tmp_path / "mine", "is in the way", overwrite=True)
    attempt(tmp_path / "mine" / "notes", "is in the way", overwrite=True)
    (tmp_path / "mine" / "notes").rename(
        tmp_path / "mine" / "manifest.json"
    )  # also others have one
    attempt(tmp_path / "mine", "is in the way", overwrite=True)
    prepare([corpus], tmp_path / "out", **DEFAULTS)
    (tmp_path / "out" / "run").mkdir()
    attempt(tmp_path / "out", "is in the way", overwrite=True)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    prepare([corpus], tmp_path / "empty", **DEFAULTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "raw"]


def test_what_a_killed_call_leaves(tmp_path, corpus, monkeypatch):
    """A replacement that fails is taken back at once, one that is killed by the next call."""
    out, old = tmp_path / "out", tmp_path / ".old-out"
    prepare([corpus], out, **DEFAULTS)
    before, rename = contents(tmp_path), Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: 1 / 0 if path.name == ".out.partial" else rename(path, to)
    )
    with pytest.raises(ZeroDivisionError):
        prepare([corpus], out, **DEFAULTS, overwrite=True)
    assert (old / "manifest.json").is_file()  # as if killed: what an OSError takes back is below
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="is in the way"):
        prepare([corpus], out, **DEFAULTS)
    assert contents(tmp_path) == before

    def full(path, to):
        if path.name == ".out.partial":
            raise OSError("disk full")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="disk full"):
        prepare([corpus], out, **DEFAULTS, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["tmpfs", "bind", "image"])
def test_a_directory_that_cannot_be_renamed(tmp_path, corpus, mount, monkeypatch, kind):
    """A volume of a container, a directory mounted from the same disk, one of a container's image."""
    prepare([corpus], tmp_path / "plain", **DEFAULTS)
    prepare([corpus], tmp_path / "seed 2", **DEFAULTS | {"seed": 2})
    plain, other = contents(tmp_path / "plain"), contents(tmp_path / "seed 2")
    out = tmp_path / "a volume" / "out"
    out.mkdir(parents=True)
    if kind == "tmpfs":
        mount("-t", "tmpfs", "tmpfs", out)
        (out / "lost+found").mkdir()
    elif kind == "bind":
        (tmp_path / "source").mkdir()
        mount("--bind", tmp_path / "source", out)
    else:
        mount("-t", "tmpfs", "tmpfs", out.parent)
        layers = [out.parent / name for name in ("lower", "upper", "work", "merged")]
        shutil.copytree(tmp_path / "seed 2", layers[0] / "out")  # part of the image
        for layer in layers[1:]:
            layer.mkdir()
        options = "lowerdir={},upperdir={},workdir={}".format(*layers[:3])
        mount("-t", "overlay", "overlay", "-o", options, layers[3])
        out = layers[3] / "out"
    inside = {"lost+found"} if kind == "tmpfs" else set()
    beside = set(out.parent.iterdir())

    def check(expected):
        assert contents(out) == expected
        assert {path.name for path in out.iterdir()} == module._NAMES | inside
        assert set(out.parent.iterdir()) == beside
        assert Prepared.open(out).find_damage(["train.txt", "tokens/train.bin"]) is None

    prepare([corpus], out, **DEFAULTS, overwrite=kind == "image")
    check(plain)
    with pytest.raises(UserError, match="is in the way"):
        prepare([corpus], out, **DEFAULTS)
    prepare([corpus], out, **DEFAULTS | {"seed": 2}, overwrite=True)
    check(other)

    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: build(*args) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare([corpus], out, **DEFAULTS, overwrite=True)
    check(other)
    monkeypatch.setattr(module, "_build", build)

    # Killed before the manifest is at its place: it is no prepared directory, and the next call finishes it.
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: 1 / 0 if path.name == "manifest.json" else rename(path, to)
    )
    with pytest.raises(ZeroDivisionError):
        prepare([corpus], out, **DEFAULTS, overwrite=True)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="is not a prepared directory"):
        Prepared.open(out)
    with pytest.raises(UserError, match="is in the way"):
        prepare([corpus], out, **DEFAULTS | {"seed": 2})
    check(plain)


def test_a_directory_whose_parent_is_read_only(tmp_path, corpus, monkeypatch):
    prepare([corpus], tmp_path / "plain", **DEFAULTS)
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    access, build, beside = os.access, module._build, []

    def watch(*args):
        beside.extend(out.parent.iterdir())
        return build(*args)

    monkeypatch.setattr(os, "access", lambda path, mode: path != out.parent and access(path, mode))
    monkeypatch.setattr(module, "_build", watch)
    prepare([corpus], out, **DEFAULTS)
    assert (beside, contents(out)) == ([out], contents(tmp_path / "plain"))
    with pytest.raises(UserError, match="cannot be written"):
        prepare([corpus], out.parent / "new", **DEFAULTS)
    (out / "mine.txt").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is in the way"):
        prepare([corpus], out, **DEFAULTS, overwrite=True)
    assert contents(tmp_path) == before


def test_bad_prepared_directories(tmp_path, corpus):
    out = tmp_path / "out"
    prepare([corpus], out, **DEFAULTS)
    with pytest.raises(UserError, match="raw is not a prepared directory"):
        Prepared.open(corpus.parent)
    tokens = out / "tokens" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train\.bin is missing, or has not"):
        Prepared.open(out).store("train")
    for text, message in [
        ("{}", "'version'"),
        ("[", "not a prepared directory"),
        ('{"version": 0}', "version 0, not 1"),
    ]:
        (out / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Prepared.open(out)


def test_the_stored_stream_of_an_unchanged_split(tmp_path, corpus):
    prepare([corpus], tmp_path / "out", **DEFAULTS)
    prepared, path = Prepared.open(tmp_path / "out"), tmp_path / "out" / "val.txt"
    sha256 = prepared.manifest["tokenizer_sha256"]
    np.testing.assert_array_equal(prepared.stored(path, sha256), prepared.store("val").tokens)
    assert prepared.stored(path, "another") is None
    assert prepared.stored(prepared.tokenizer_path, sha256) is None
    assert prepared.stored(corpus, sha256) is None
    elsewhere = tmp_path / "val.txt"
    elsewhere.write_bytes(path.read_bytes())
    assert hash_file(elsewhere) == hash_file(path)
    assert prepared.stored(elsewhere, sha256) is None
    path.write_bytes(path.read_bytes() + b"more\n")
    assert prepared.stored(path, sha256) is None


@pytest.mark.slow
def test_the_demo_text_is_prose_and_the_same_again():
    from l1_jax.commands.make_demo_corpus import harvest

    samples = list(harvest(100_000))
    assert samples == list(harvest(100_000))
    assert len(set(samples)) == len(samples)
    assert 90_000 < sum(len(sample.encode()) + 1 for sample in samples) <= 100_000
    assert not [s for s in samples if len(s) < 40 or "\n" in s or "  " in s or ">>>" in s]
