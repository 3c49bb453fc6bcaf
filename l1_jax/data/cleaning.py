"""Which documents are kept, and the ledger of what was dropped and why. The text of a kept document is not altered."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field


@dataclass
class Ledger:
    """What became of the documents read. In file mode `not_utf8` counts lines, the document itself being kept."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, documents: int) -> None:
        """Counts a broken line, with which 1 or 0 documents are lost."""
        self.read += documents
        self.dropped[reason] += 1


def clean(documents: Iterable[str], ledger: Ledger, dedup: bool) -> Iterator[str]:
    """The documents that are not blank (white space only) and, with `dedup`, not seen before; counts in `ledger`."""
    with closing(sqlite3.connect("")) as seen:  # "" is a temporary file, in $SQLITE_TMPDIR or /var/tmp
        seen.execute("PRAGMA cache_size = -65536")  # KiB
        seen.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        for text in documents:
            ledger.read += 1
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if not text or text.isspace():  # to add a filter: a reason here
                ledger.dropped["blank"] += 1
            elif dedup and not seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount:
                ledger.dropped["duplicate"] += 1
            else:
                ledger.kept += 1
                yield text
