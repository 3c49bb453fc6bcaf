"""Files -> documents, and what is dropped on the way."""

import gzip
import json

import pytest

from l1_jax.data.cleaning import Ledger, clean
from l1_jax.data.readers import documents
from l1_jax.data.readers.documents import find_files, read_documents
from l1_jax.errors import UserError


def read(path, mode="line"):
    ledger = Ledger()
    return list(read_documents(find_files([path]), mode, ledger.drop)), dict(ledger.dropped)


@pytest.mark.parametrize(
    ("content", "lines", "whole"),
    [
        (b"a\nb\n", ["a", "b"], "a\nb\n"),
        (b"a\nb", ["a", "b"], "a\nb"),
        (b"\xef\xbb\xbfa\r\n\r\nb\rc\n", ["a", "", "b", "c"], "a\n\nb\nc\n"),
        (
            " a \u2028 b\x0bc\x1cd\x85e\n".encode(),
            [" a \u2028 b\x0bc\x1cd\x85e"],
            " a \u2028 b\x0bc\x1cd\x85e\n",
        ),
        ("a\n\ufeffb\n".encode(), ["a", "\ufeffb"], "a\n\ufeffb\n"),  # only the first is a mark
    ],
)
def test_lines_and_files(tmp_path, content, lines, whole):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert read(path) == (lines, {})
    assert read(path, "file") == ([whole], {})


def test_broken_lines_are_dropped_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"first\n\xff\xfe\xe9t\xe9\nb\n\xc3\nc\n")  # two of five
    assert read(path) == (["first", "b", "c"], {"not_utf8": 2})
    assert read(path, "file") == (["first\nb\nc\n"], {"not_utf8": 2})


def test_formats(tmp_path):
    long = "d " * 40
    records = (
        '{"text": "a\\r\\nb"}\n{"other": 1}\n\n[1]\n{"text": "\\ud800"}\n{"text": "c"}\n'
        + f'{{"text": "{long}"}}\n'
    )
    (tmp_path / "a.jsonl").write_text(records)
    expected = (["a\nb", "", "c", long], {"not_json": 3})
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl", "file") == expected
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(records.encode()))
    assert read(tmp_path / "b.jsonl.gz") == expected
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"e\nf", mtime=0))
    assert read(tmp_path / "c.md.gz", "file") == (["e\nf"], {})


def test_a_directory_is_read_to_the_bottom_in_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/.hidden", ".git/config", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])] == [
        "a/z.txt",
        "b.txt",
        "c",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xe9\n\xff\n" + b"a" * 9, "2 of 3 lines are not UTF-8"),
        ("a.txt", bytes(range(256)) * 4, "4 of 9 lines are not UTF-8"),
        ("a.txt", b"a\nb\n" + b"\xe9" * 9, "1 of 3 lines are not UTF-8"),
        ("a.txt", "text\n".encode("utf-16"), "UTF-16"),
        ("a.txt", b"\x00\x00\xfe\xff", "UTF-16 or UTF-32"),
        ("a.jsonl", b"text\n", 'not JSON with a string "text"'),
        ("a.txt.gz", b"text\n", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text\n" * 9, mtime=0)[:-9], "cannot be read"),
        (
            "a.txt.gz",
            gzip.compress(b"text\n" * 9, mtime=0)[:10] + bytes([255] * 20),
            "cannot be read",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["line", "file"])
def test_bad_files(tmp_path, name, content, message, mode):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name, mode)
    assert str(tmp_path / name) in str(error.value)


def test_bad_paths(tmp_path):
    with pytest.raises(UserError, match=r"absent\.txt does not exist"):
        read(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="holds no files"):
        read(tmp_path)
    with pytest.raises(UserError, match="not a regular file"):
        read("/dev/null")


def test_cleaning_counts_what_it_drops():
    documents = ["a ", "", "a ", "a", " \t\n\u2003", "b", "b"]
    ledger = Ledger()
    assert list(clean(documents, ledger, dedup=True)) == ["a ", "a", "b"]
    expected = {"read": 7, "kept": 3, "dropped": {"blank": 2, "duplicate": 2}}
    assert json.loads(json.dumps(vars(ledger))) == expected
    assert list(clean(documents, Ledger(), dedup=False)) == ["a ", "a ", "a", "b", "b"]


def test_a_format_is_a_function_and_its_suffix(tmp_path, monkeypatch):
    """Unpacking, the errors of files and the ledger are common to all formats."""

    def read_numbers(path, file, mode, drop):
        for word in file.read().split():
            if word.isdigit():
                yield f"{mode} {int(word)}"
            else:
                drop("no_number", 1)

    monkeypatch.setitem(documents.READERS, ".numbers", read_numbers)
    (tmp_path / "a.numbers").write_bytes(b"1 x 2")
    (tmp_path / "b.NUMBERS.gz").write_bytes(gzip.compress(b"3 y"))
    (tmp_path / "c.numbers.txt").write_bytes(b"4 z")
    assert read(tmp_path) == (["line 1", "line 2", "line 3", "4 z"], {"no_number": 2})
    (tmp_path / "b.NUMBERS.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path)
