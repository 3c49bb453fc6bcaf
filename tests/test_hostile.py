"""Files that mean harm, or look like it: links that lead out, names that climb, sizes and types that nobody meant."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from e2e.test_run import train_args
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from l1_jax.checkpoint.saver import recover
from l1_jax.config.resolve import resolve_batch
from l1_jax.config.schema import Config
from l1_jax.data.byte_level import END_OF_TEXT, ByteLevel
from l1_jax.data.prepare import prepare
from l1_jax.data.readers.documents import find_files
from l1_jax.data.store import Prepared
from l1_jax.data.tokenizer_kinds import open_tokenizer
from l1_jax.errors import UserError
from l1_jax.storage import files
from l1_jax.storage.remote import Remote

HOW: dict[str, Any] = {
    "vocab_size": 300,
    "train_ratio": 1.0,
    "val_ratio": 0.0,
    "seed": 0,
    "tokenizer": "bytes",
}


@pytest.fixture
def precious(tmp_path):
    """A directory that nothing here may read, write or delete."""
    path = tmp_path / "precious"
    path.mkdir()
    for name in ("notes.txt", "checkpoint.json", "manifest.json", "train.bin"):
        (path / name).write_text("precious\n")
    yield path
    assert {file.name: file.read_text() for file in path.iterdir()} == dict.fromkeys(
        ("notes.txt", "checkpoint.json", "manifest.json", "train.bin"), "precious\n"
    )


def test_links_of_a_corpus(tmp_path, precious):
    raw = tmp_path / "raw"
    (raw / "sub").mkdir(parents=True)
    (raw / "a.txt").write_text("text\n")
    (raw / "sub" / "b.txt").symlink_to("../a.txt")
    (tmp_path / "root").symlink_to(raw)
    assert [path.name for path in find_files([tmp_path / "root"])] == [
        "a.txt",
        "b.txt",
    ]  # the root may be a link
    for target in (precious / "notes.txt", precious, "../precious/notes.txt", tmp_path / "absent"):
        (raw / "out").symlink_to(target)
        with pytest.raises(UserError, match=r"raw/out lies outside of .*raw, by way of a link"):
            find_files([raw])
        (raw / "out").unlink()
    (raw / "loop").symlink_to("loop")
    assert len(find_files([raw])) == 2
    assert find_files([precious / "notes.txt"])  # what is named is meant


def test_links_of_a_prepared_directory(tmp_path, prepared, precious):
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    (tmp_path / "root").symlink_to(data)
    assert Prepared.open(tmp_path / "root").store("train").num_documents
    for name, target in [
        ("tokens", precious),
        ("tokenizer.json", precious / "notes.txt"),
        ("test.txt", "../../x"),
    ]:
        (data / name).rename(tmp_path / "away")
        (data / name).symlink_to(target)
        with pytest.raises(UserError, match=r"data/.* lies outside of .*data, by way of a link"):
            Prepared.open(data)
        (data / name).unlink()
        (tmp_path / "away").rename(data / name)
    Prepared.open(data)


def test_preparation_follows_no_link_out(tmp_path, precious):
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / ".out.partial").symlink_to(precious)  # where it writes before it renames
    (tmp_path / ".old-out").symlink_to(precious)  # and what it renames the old one to
    prepare([tmp_path / "a.txt"], tmp_path / "out", **HOW)
    (tmp_path / "out" / "train.txt").unlink()
    (tmp_path / "out" / "train.txt").symlink_to(precious / "notes.txt")
    shutil.rmtree(tmp_path / "out" / "tokens")
    (tmp_path / "out" / "tokens").symlink_to(precious)
    (tmp_path / "link").symlink_to("out")  # the root may be one, and stays one
    prepare([tmp_path / "a.txt"], tmp_path / "link", **HOW, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert Prepared.open(tmp_path / "out").store("train").num_documents == 1
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError):
        prepare([tmp_path / "a.txt"], tmp_path / "loop", **HOW)


def test_a_run_directory_with_links_out_is_refused(
    script, trained, prepared, tiny_config, tmp_path, precious
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    args = train_args(tiny_config, prepared, run, "training.max_steps=101")
    for name in (
        "checkpoint-100",
        "best_model",
        "metrics.jsonl",
        "tensorboard",
        "run.json",
        ".saving-5",
    ):
        away = run / name
        if away.exists():
            away.rename(tmp_path / "away")
        away.symlink_to(precious if "." not in name[1:] else precious / "notes.txt")
        for flag in ("--resume", "--overwrite"):
            result = script("train", flag, *args)
            assert (result.code, f"run/{name} lies outside of" in result.error) == (2, True), (
                result.err
            )
        if name == "best_model":
            result = script("generate", "--model", run, "--prompt", "A", "--max-tokens", 1)
            assert (result.code, "run/best_model lies outside of" in result.error) == (2, True), (
                result.err
            )
        away.unlink()
        if (tmp_path / "away").exists():
            (tmp_path / "away").rename(away)
    (tmp_path / "link").symlink_to(run)
    result = script("generate", "--model", tmp_path / "link", "--prompt", "A", "--max-tokens", 1)
    assert result.code == 0, result.err


def test_deleting_and_writing_follow_no_link(tmp_path, precious):
    for name in (".deleting-checkpoint-5", ".saving-7", ".old-checkpoint-9", ".old-best_model"):
        (tmp_path / name).symlink_to(precious)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "best_model").mkdir()
    recover(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best_model",
        "checkpoint-9",
        "precious",
    ]
    (tmp_path / ".a.txt.partial").symlink_to(precious / "notes.txt")
    files.write_text(tmp_path / "a.txt", "text")
    (tmp_path / "name").symlink_to(precious)
    (tmp_path / "new").mkdir()
    files.replace(tmp_path / "new", tmp_path / "name")
    assert (tmp_path / "name").is_dir()
    assert not (tmp_path / "name").is_symlink()


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..", "a\0b"])
def test_an_objects_name_does_not_lead_out(tmp_path, name):
    fsspec.filesystem("memory").pipe_file("/hostile/x", b"x")
    home = tmp_path / "home"
    with pytest.raises(UserError, match="which would lie outside of a directory"):
        Remote("memory://hostile").download(home, ["x", name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    ["zip://a::file://b", "reference://x", "://", "file://\0", "libarchive://x", "memory://["],
)
def test_any_url_is_answered_in_a_line(url):
    with pytest.raises(UserError):
        Prepared.open(url)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", "run.json is damaged"),
        ("run.json", b"[]", "run.json is damaged"),
        ("run.json", b"{}", "run.json is damaged (no run_id)"),
        ("run.json", b" " * (2**20 + 1), "run.json is longer than 1,048,576 bytes"),
        ("metrics.jsonl", b'{"step": 1}\n{"stp": 1}\n', "metrics.jsonl:2 is damaged"),
        ("metrics.jsonl", b'{"step": "1"}\n', "metrics.jsonl:1 is damaged"),
        ("metrics.jsonl", b"[" * 99_999 + b"\n", "metrics.jsonl:1 is damaged"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl:1 is damaged. Delete the line"),
    ],
)
def test_damaged_files_of_a_run(
    script, trained, prepared, tiny_config, tmp_path, name, content, message
):
    run = tmp_path / "run"
    shutil.copytree(trained, run, copy_function=os.link)
    (run / name).unlink()
    (run / name).write_bytes(content)
    result = script(
        "train", "--resume", *train_args(tiny_config, prepared, run, "training.max_steps=101")
    )
    assert (result.code, message in result.error) == (2, True), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "O"}, "dtype O"),
        ({"dtype": "<f8"}, "dtype <f8"),
        ({"splits": {"train": {"tokens": -1, "documents": 1}}}, "counts that are none"),
        ({"splits": {"train": {"tokens": "9", "documents": 1}}}, "counts that are none"),
        ({"splits": []}, "not one of ours"),
        ({"hash_chain": []}, "not one of ours"),
    ],
)
def test_a_hostile_manifest(tmp_path, prepared, changes, message):
    shutil.copytree(prepared, tmp_path / "data")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        Prepared.open(tmp_path / "data")
    path.write_text("[" * 99_999)
    with pytest.raises(UserError, match="not one of ours"):
        Prepared.open(tmp_path / "data")


def test_special_tokens_of_a_given_tokenizer(tmp_path):
    """Its own special tokens are as far from text as ours; a text token that is called as ours is refused."""
    path = tmp_path / "given.json"
    ByteLevel.bytes_only().save(path)
    foreign = HuggingFaceTokenizer.from_file(str(path))
    foreign.add_special_tokens([AddedToken("<|pad|>", special=True)])
    foreign.save(str(path))
    text = f"a<|pad|>b{END_OF_TEXT}"
    assert (
        foreign.encode(text).ids
        != open_tokenizer(path).encode(text)
        == ByteLevel.bytes_only().encode(text)
    )
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="makes a special token of text"):
        open_tokenizer(path)


def test_a_tokenizer_of_any_size(tmp_path):
    with open(tmp_path / "huge.json", "wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(
        UserError, match=r"huge\.json is not a tokenizer\.json .*1,099,511,627,776 bytes"
    ):
        open_tokenizer(tmp_path / "huge.json")


def test_an_error_stays_on_its_line():
    error = UserError("a\nb\r\x1b[31m\u202e\udcff é漢 is wrong", "Mend it")
    assert str(error) == r"a\nb\r\x1b[31m\u202e\udcff é漢 is wrong. Mend it."


def test_products_of_legal_numbers():
    training = (
        Config().replace("training", batch_size=2**20, gradient_accumulation_steps=2**20).training
    )
    with pytest.raises(UserError, match="is 8796093022208, above 4194304"):
        resolve_batch(training, 8, None)


def test_epochs_beyond_the_counter(script, prepared, tiny_config, tmp_path):
    args = train_args(tiny_config, prepared, tmp_path / "run")
    result = script(
        "train", *(arg for arg in args if "max_steps" not in str(arg)), "training.num_epochs=1e18"
    )
    assert (result.code, "steps, and 2147483647 is the most" in result.error) == (2, True), (
        result.err
    )
    assert not Path(tmp_path / "run").exists()
