"""Files on disk -> documents: which files there are, and the reader of each by its suffix."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from l1_jax.data.readers.jsonl import read_jsonl
from l1_jax.data.readers.lines import Drop
from l1_jax.data.readers.text import read_text
from l1_jax.errors import UserError
from l1_jax.storage.files import check_inside
from l1_jax.storage.remote import is_url

# Opens a file, unbuffered, for reading bytes; may watch how much is read.
Open = Callable[[Path], Any]


class Reader(Protocol):
    """Reads a format."""

    def __call__(self, path: Path, file: Any, mode: str, drop: Drop) -> Iterator[str]:
        """The documents of a file, in order, one at a time in memory.

        Args:
            path: of the file, for messages.
            file: opened for reading bytes, buffered and unpacked.
            mode: "line" or "file", what a document is where the format does not say it.
            drop: called for all that is broken.

        Raises:
            UserError: it is not of this format, or too much of it is broken.
        """
        ...


# The format of a file by its suffix, in small letters; all others are text.
READERS: dict[str, Reader] = {".jsonl": read_jsonl}

_PACKED = ".gz"
_BUFFER_BYTES = 1 << 20


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
    is_packed = suffixes[-1:] == [_PACKED]
    if is_packed:
        suffixes.pop()

    suffix = suffixes[-1] if suffixes else ""
    read = READERS.get(suffix, read_text)

    with io.BufferedReader(open_file(path), _BUFFER_BYTES) as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if is_packed else raw
        yield from read(path, file, mode, drop)
