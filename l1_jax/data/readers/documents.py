"""Text on disk -> documents: the formats, and the one encoding policy.

Text is UTF-8. A byte-order mark is stripped; CRLF and a lone CR become LF, and a line ends nowhere else (U+2028, \x0b
and \x1c are text). A broken line is dropped and counted; a file is refused where more than half of it is broken,
by lines or by characters.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from l1_jax.errors import UserError
from l1_jax.storage.files import check_inside
from l1_jax.storage.remote import is_url

# Told of every broken line: the reason, and whether a whole document is lost with it (1) or only a part of one (0).
Drop = Callable[[str, int], None]
Open = Callable[[Path], Any]  # opens a file, unbuffered, for reading bytes; may watch how much is read
_SURROGATE = re.compile("[\ud800-\udfff]")


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of the corpus, in a fixed order; directories are searched to the bottom, hidden files skipped.

    UserError where a path is not there or is not a regular file, a file is empty, a directory holds no files, or a link
    that leads out of it.
    """
    found: list[Path] = []
    for url in filter(is_url, inputs):
        raise UserError(f"the input {url} is a URL, and texts are read from the local disk", "Download it first")
    for path in map(Path, inputs):
        if path.is_dir():
            names = [p.relative_to(path).as_posix() for p in sorted(path.rglob("*"))]
            names = [name for name in names if "/." not in f"/{name}"]
            check_inside(path, *(name for name in names if (path / name).is_symlink()))
            inside = [path / name for name in names if (path / name).is_file()]
            if not inside:
                raise UserError(f"the directory {path} holds no files", "Put text files into it, or give another path")
            found += inside
        elif not path.is_file():
            raise UserError(f"{path} does not exist, or is not a regular file", "Check the path")
        elif path.stat().st_size == 0:
            raise UserError(f"{path} is empty", "Give a file with text in it")
        else:
            found.append(path)
    return found


def read_documents(paths: Sequence[Path], mode: str, drop: Drop, open_file: Open = io.FileIO) -> Iterator[str]:
    """The documents of the files, in order, one at a time in memory.

    Args:
        mode: "line", a document a line without its line end; or "file", the whole file a document, blank lines and
            final newline included. A record of a .jsonl file is a document in both.
        drop: called for every broken line.

    Raises:
        UserError: a file cannot be read, or is not text.
    """
    for path in paths:
        try:
            yield from _read_file(path, mode, drop, open_file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error})", "Check the file and its permissions") from error


def _read_file(path: Path, mode: str, drop: Drop, open_file: Open) -> Iterator[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    is_jsonl = ".jsonl" in suffixes[-2 if zipped else -1 :]
    is_document = mode == "file" and not is_jsonl
    whole = bytearray()  # a list of the lines would take several times the file
    lines = chars = bad_lines = bad_chars = 0
    with io.BufferedReader(open_file(path), 1 << 20) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
        if stream.peek(4)[:4].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise UserError(f"{path} is UTF-16 or UTF-32, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8")
        # Undecodable bytes become lone surrogates, which UTF-8 text never has.
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            lines, chars = lines + 1, chars + len(line)
            is_utf8 = line.isascii() or not _SURROGATE.search(line)
            text = (_text_of_record(line) if is_jsonl else line) if is_utf8 else None
            if text is None:
                bad_lines, bad_chars = bad_lines + 1, bad_chars + len(line)
                drop("not_json" if is_utf8 else "not_utf8", 0 if is_document else 1)
            elif is_document:
                whole += text.encode()
            else:
                yield text if is_jsonl else text.removesuffix("\n")
    if is_document:
        yield whole.decode()
    if 2 * bad_lines > lines or 2 * bad_chars > chars:
        what, remedy = "not UTF-8", "Give a text file, or convert it: iconv -f LATIN1 -t UTF-8"
        if is_jsonl:
            what, remedy = 'not JSON with a string "text"', 'Write one object a line: {"text": "..."}'
        raise UserError(f"{path}: {bad_lines} of {lines} lines are {what}", remedy)


def _text_of_record(line: str) -> str | None:
    try:
        record: Any = json.loads(line) if line.strip() else {"text": ""}  # a blank line is not a broken one
        text = record["text"].replace("\r\n", "\n").replace("\r", "\n")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return None if _SURROGATE.search(text) else text  # JSON can spell half a surrogate pair, which is no character
