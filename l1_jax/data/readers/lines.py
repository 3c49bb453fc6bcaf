"""Bytes -> lines of text, by the one encoding policy.

Text is UTF-8. A byte-order mark is stripped. CRLF and a lone CR become LF, and a line ends nowhere
else (U+2028, \x0b and \x1c are text). A broken line is dropped and counted. A file is refused where
more than half of it is broken, by lines or by characters.
"""

import codecs
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from l1_jax.errors import UserError

# Told of every broken line: the reason, and whether a whole document is lost with it (1) or only a
# part of one (0).
Drop = Callable[[str, int], None]

_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
_SURROGATE = re.compile("[\ud800-\udfff]")


def has_surrogates(text: str) -> bool:
    """Whether some of it is no character."""
    return not text.isascii() and _SURROGATE.search(text) is not None


class Lines:
    """The lines of a file with their line ends, counted; one that is not UTF-8 has surrogates.

    Args:
        path: of the file, for messages.
        file: opened for reading bytes, with `peek`.
    """

    def __init__(self, path: Path, file: Any):
        self._path = path
        self._file = file
        self._num_lines = 0
        self._num_chars = 0
        self._bad_lines = 0
        self._bad_chars = 0

    def __iter__(self) -> Iterator[str]:
        """Once.

        Raises:
            UserError: the file is UTF-16 or UTF-32.
        """
        if self._file.peek(4)[:4].startswith(_OTHER_MARKS):
            what = f"{self._path} is UTF-16 or UTF-32, not UTF-8"
            raise UserError(what, "Convert it: iconv -f UTF-16 -t UTF-8")

        # Undecodable bytes become lone surrogates, which UTF-8 text never has.
        for line in io.TextIOWrapper(self._file, encoding="utf-8-sig", errors="surrogateescape"):
            self._num_lines += 1
            self._num_chars += len(line)
            yield line

    def count_broken(self, line: str) -> None:
        """Counts one of the lines as broken."""
        self._bad_lines += 1
        self._bad_chars += len(line)

    def check(self, fault: str, remedy: str) -> None:
        """Checks that no more than half of the file is broken.

        Args:
            fault: what its broken lines are.
            remedy: what is to be done then.

        Raises:
            UserError: more than half is.
        """
        too_many_lines = 2 * self._bad_lines > self._num_lines
        too_many_chars = 2 * self._bad_chars > self._num_chars

        if too_many_lines or too_many_chars:
            what = f"{self._path}: {self._bad_lines} of {self._num_lines} lines are {fault}"
            raise UserError(what, remedy)
