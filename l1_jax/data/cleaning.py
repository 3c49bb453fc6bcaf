"""Which documents are kept, and the ledger of what was dropped and why.

The text of a kept document is not altered.
"""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

_CACHE_KIB = 1 << 16  # of memory for the digests; the others lie on the disk
_DIGEST_BYTES = 16


@dataclass
class Ledger:
    """What became of the documents read.

    In file mode `not_utf8` counts lines, and the document itself is kept.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, documents: int) -> None:
        """Counts a broken line, with which 1 or 0 documents are lost."""
        self.read += documents
        self.dropped[reason] += 1


def clean(documents: Iterable[str], ledger: Ledger, dedup: bool) -> Iterator[str]:
    """Yields the documents that are kept, unaltered and in order, and counts all of them in
    `ledger`.

    Args:
        documents: any number of texts; one at a time is in memory.
        ledger: what was read, kept and dropped is added to it.
        dedup: drops a document that was seen before, too. Blank ones (white space only) always go.
    """
    # An empty name is a temporary file, in $SQLITE_TMPDIR or /var/tmp: a large corpus has more
    # digests than memory holds.
    with closing(sqlite3.connect("")) as seen:
        seen.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")  # a negative number is in KiB
        seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")

        for text in documents:
            ledger.read += 1

            # To add a filter: one more reason here.
            if not text or text.isspace():
                ledger.dropped["blank"] += 1
            elif dedup and not _remember(seen, text):
                ledger.dropped["duplicate"] += 1
            else:
                ledger.kept += 1
                yield text


def _remember(seen: sqlite3.Connection, text: str) -> bool:
    """Whether the text is new; it is remembered by its digest."""
    digest = hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest()
    inserted = seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,))
    return inserted.rowcount > 0
