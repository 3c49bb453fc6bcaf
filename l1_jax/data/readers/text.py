"""Plain text -> documents: a line each, or the whole file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.data.readers.lines import Drop, Lines, has_surrogates


def read_text(path: Path, file: Any, mode: str, drop: Drop) -> Iterator[str]:
    """The documents of a text file; see `Reader`."""
    is_whole = mode == "file"
    whole = bytearray()  # a list of the lines would take several times the file
    lines = Lines(path, file)

    for line in lines:
        if has_surrogates(line):
            lines.count_broken(line)
            drop("not_utf8", 0 if is_whole else 1)
        elif is_whole:
            whole += line.encode()
        else:
            yield line.removesuffix("\n")

    if is_whole:
        yield whole.decode()

    remedy = "Give a text file, or convert it: iconv -f LATIN1 -t UTF-8"
    lines.check("not UTF-8", remedy)
