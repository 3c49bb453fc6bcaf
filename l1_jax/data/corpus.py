"""Text on disk -> documents: the formats, and the one encoding policy.

Text is UTF-8. A byte-order mark is stripped; CRLF and a lone CR become LF, and a line ends nowhere else (U+2028, \\x0b
and \\x1c are text). A broken line is dropped and counted; a file is refused where more than half of it is broken,
by lines or by characters.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from l1_jax.errors import UserError

MODES = ("line", "file")
# Told of every broken line: the reason, and whether a whole document is lost with it (1) or only a part of one (0).
Drop = Callable[[str, int], None]
# May wrap each file as it is opened, to watch how much has been read.
Watch = Callable[[BinaryIO], BinaryIO]


class Source(NamedTuple):
    """A file of the corpus, and its name in the manifest: relative to the input that it was found under."""

    name: str
    path: Path


def find_files(inputs: Sequence[str | Path]) -> list[Source]:
    """The files of the corpus, in a fixed order; directories are searched to the bottom, hidden files skipped.

    Args:
        inputs: files and directories.

    Raises:
        UserError: a path does not exist or is not a regular file, a file is empty, a directory holds no files.
    """
    sources: list[Source] = []
    for path in map(Path, inputs):
        if path.is_dir():
            names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
            found = [name for name in names if not any(part.startswith(".") for part in name.parts)]
            if not found:
                raise UserError(f"the directory {path} holds no files", "Put text files into it, or give another path")
            sources += [Source(name.as_posix(), path / name) for name in found]
        elif not path.exists():
            raise UserError(f"{path} does not exist", "Check the path")
        elif not path.is_file():
            raise UserError(f"{path} is not a regular file", "Save the text to a file: it is read more than once")
        elif path.stat().st_size == 0:
            raise UserError(f"{path} is empty", "Give a file with text in it")
        else:
            sources.append(Source(path.name, path))
    return sources


def read_documents(sources: Sequence[Source], mode: str, drop: Drop, watch: Watch = lambda file: file) -> Iterator[str]:
    """The documents of the files, in order, one at a time in memory.

    Args:
        sources: from `find_files`.
        mode: "line", a document a line without its line end; or "file", the whole file a document, blank lines and
            final newline included. A record of a .jsonl file is a document in both.
        drop: called for every broken line.
        watch: wraps each file as it is opened.

    Raises:
        UserError: a file cannot be read, or is not text.
    """
    for source in sources:
        try:
            yield from _read_file(source.path, mode, drop, watch)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source.path} cannot be read ({error})", "Check the file and its permissions") from error


def _read_text(lines: Iterator[str], mode: str, _drop: Drop) -> Iterator[str]:
    if mode == "line":
        for line in lines:
            yield line.removesuffix("\n")
    else:
        content = bytearray()  # a list of the lines would take several times the file
        for line in lines:
            content += line.encode()
        yield content.decode()


def _read_jsonl(lines: Iterator[str], _mode: str, drop: Drop) -> Iterator[str]:
    for line in lines:
        try:
            record: Any = json.loads(line) if line.strip() else {"text": ""}  # a blank line is not a broken one
            text = record["text"].replace("\r\n", "\n").replace("\r", "\n")
            text.encode()  # JSON can spell half a surrogate pair, which is no character
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            drop("not_json", 1)
        else:
            yield text


# To add a format: a reader of lines here, or of compressed bytes below. Any other suffix is read as text.
READERS = {".txt": _read_text, ".jsonl": _read_jsonl}
DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {".gz": lambda file: gzip.GzipFile(fileobj=file)}


def _read_file(path: Path, mode: str, drop: Drop, watch: Watch) -> Iterator[str]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    decompress = DECOMPRESSORS.get(suffixes.pop()) if suffixes and suffixes[-1] in DECOMPRESSORS else None
    reader = READERS.get(suffixes[-1] if suffixes else ".txt", _read_text)
    size = all_lines = all_chars = bad_lines = bad_chars = 0

    def drop_line(reason: str, documents: int) -> None:
        nonlocal bad_lines, bad_chars
        bad_lines, bad_chars = bad_lines + 1, bad_chars + size
        drop(reason, documents)

    def lines(stream: BinaryIO) -> Iterator[str]:
        nonlocal size, all_lines, all_chars
        # Undecodable bytes become lone surrogates, which do not encode again: that marks the line.
        for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape"):
            size = len(line)
            all_lines, all_chars = all_lines + 1, all_chars + size
            try:
                line.isascii() or line.encode()
            except UnicodeEncodeError:
                drop_line("not_utf8", 0 if mode == "file" and reader is _read_text else 1)
            else:
                yield line

    with open(path, "rb", buffering=0) as raw:
        stream: Any = io.BufferedReader(watch(raw), buffer_size=1 << 20)  # type: ignore[type-var]
        stream = decompress(stream) if decompress else stream
        if stream.peek(4)[:4].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise UserError(f"{path} is UTF-16 or UTF-32, not UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8")
        yield from reader(lines(stream), mode, drop_line)
    if 2 * bad_lines > all_lines or 2 * bad_chars > all_chars:
        broken, remedy = "not UTF-8", "Give a text file, or convert it: iconv -f LATIN1 -t UTF-8"
        if reader is _read_jsonl:
            broken, remedy = 'not JSON with a string "text"', 'Write one object a line: {"text": "..."}'
        raise UserError(f"{path}: {bad_lines} of {all_lines} lines are {broken}", remedy)
