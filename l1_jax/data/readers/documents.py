"""Text on disk -> documents: the formats, and the one encoding policy.

Text is UTF-8. A byte-order mark is stripped. CRLF and a lone CR become LF, and a line ends nowhere
else (U+2028, \x0b and \x1c are text). A broken line is dropped and counted. A file is refused where
more than half of it is broken, by lines or by characters.
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

# Told of every broken line: the reason, and whether a whole document is lost with it (1) or only a
# part of one (0).
Drop = Callable[[str, int], None]
# Opens a file, unbuffered, for reading bytes; may watch how much is read.
Open = Callable[[Path], Any]

_BUFFER_BYTES = 1 << 20
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_SURROGATE = re.compile("[\ud800-\udfff]")


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of the corpus, in a fixed order.

    Directories are searched to the bottom; hidden files in them are skipped.

    Raises:
        UserError: a path is not there or is not a regular file, a file is empty, a directory holds
            no files, or a link that leads out of it.
    """
    for url in filter(is_url, inputs):
        what = f"the input {url} is a URL, and texts are read from the local disk"
        raise UserError(what, "Download it first")

    found: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found += _find_files_below(path)
        elif not path.is_file():
            raise UserError(f"{path} does not exist, or is not a regular file", "Check the path")
        elif path.stat().st_size == 0:
            raise UserError(f"{path} is empty", "Give a file with text in it")
        else:
            found.append(path)
    return found


def _find_files_below(directory: Path) -> list[Path]:
    names = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        is_hidden = "/." in f"/{name}"  # itself, or a directory above it
        if not is_hidden:
            names.append(name)

    links = [name for name in names if (directory / name).is_symlink()]
    check_inside(directory, *links)

    files = [directory / name for name in names if (directory / name).is_file()]
    if not files:
        what = f"the directory {directory} holds no files"
        raise UserError(what, "Put text files into it, or give another path")
    return files


def read_documents(
    paths: Sequence[Path], mode: str, drop: Drop, open_file: Open = io.FileIO
) -> Iterator[str]:
    """The documents of the files, in order, one at a time in memory.

    Args:
        paths: of the files. A record of a .jsonl file is a document in both modes; .gz is unpacked.
        mode: "line", a document a line without its line end; or "file", the whole file a document,
            blank lines and final newline included.
        drop: called for every broken line.
        open_file: opens a file for reading bytes.

    Raises:
        UserError: a file cannot be read, or is not text.
    """
    for path in paths:
        try:
            yield from _read_file(path, mode, drop, open_file)
        except (OSError, EOFError, zlib.error) as error:
            what = f"{path} cannot be read ({error})"
            raise UserError(what, "Check the file and its permissions") from error


def _read_file(path: Path, mode: str, drop: Drop, open_file: Open) -> Iterator[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_gzip = suffixes[-1:] == [".gz"]
    is_jsonl = ".jsonl" in (suffixes[-2:] if is_gzip else suffixes[-1:])
    is_document = mode == "file" and not is_jsonl

    whole = bytearray()  # a list of the lines would take several times the file
    num_lines = 0
    num_chars = 0
    bad_lines = 0
    bad_chars = 0

    with io.BufferedReader(open_file(path), _BUFFER_BYTES) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if is_gzip else raw
        if stream.peek(4)[:4].startswith(_OTHER_MARKS):
            what = f"{path} is UTF-16 or UTF-32, not UTF-8"
            raise UserError(what, "Convert it: iconv -f UTF-16 -t UTF-8")

        # Undecodable bytes become lone surrogates, which UTF-8 text never has.
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            num_lines += 1
            num_chars += len(line)

            is_utf8 = line.isascii() or not _SURROGATE.search(line)
            text: str | None = None
            if is_utf8:
                text = _text_of_record(line) if is_jsonl else line

            if text is None:
                bad_lines += 1
                bad_chars += len(line)
                drop("not_json" if is_utf8 else "not_utf8", 0 if is_document else 1)
            elif is_document:
                whole += text.encode()
            elif is_jsonl:
                yield text
            else:
                yield text.removesuffix("\n")

    if is_document:
        yield whole.decode()

    if 2 * bad_lines > num_lines or 2 * bad_chars > num_chars:
        if is_jsonl:
            fault = 'not JSON with a string "text"'
            remedy = 'Write one object a line: {"text": "..."}'
        else:
            fault = "not UTF-8"
            remedy = "Give a text file, or convert it: iconv -f LATIN1 -t UTF-8"
        raise UserError(f"{path}: {bad_lines} of {num_lines} lines are {fault}", remedy)


def _text_of_record(line: str) -> str | None:
    """The text of a line of a .jsonl file; None where the line is broken."""
    if not line.strip():
        return ""  # a blank line is not a broken one

    try:
        record: Any = json.loads(line)
        text = record["text"].replace("\r\n", "\n").replace("\r", "\n")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

    # JSON can spell half a surrogate pair, which is no character.
    return None if _SURROGATE.search(text) else text
