"""Which documents are kept, and the ledger of what was dropped and why. The text of a kept document is not altered."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Ledger:
    """What became of the documents read. In file mode `not_utf8` counts lines, the document itself being kept."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, documents: int = 1) -> None:
        """Counts a broken line, with which 1 or 0 documents are lost."""
        self.read += documents
        self.dropped[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """The ledger as it stands in the manifest."""
        return {"read": self.read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}


class Seen:
    """The digests of the documents seen so far, in a new file at `path`: memory does not grow with the corpus."""

    def __init__(self, path: Path):
        self._database = sqlite3.connect(path, isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA cache_size = -65536",  # KiB
            "CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID",
            "BEGIN",  # never committed: the file serves this run only
        ):
            self._database.execute(statement)

    def repeats(self, text: str) -> bool:
        """Whether exactly this text has been asked about before."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 0

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()


def clean(documents: Iterable[str], ledger: Ledger, seen: Seen | None) -> Iterator[str]:
    """The documents that are kept: not blank (white space only), and not seen before.

    Args:
        documents: the text of each.
        ledger: counts every document here.
        seen: of this run; None keeps duplicates.
    """
    for text in documents:
        ledger.read += 1
        if not text or text.isspace():  # to add a filter: a reason here
            ledger.dropped["blank"] += 1
        elif seen and seen.repeats(text):
            ledger.dropped["duplicate"] += 1
        else:
            ledger.kept += 1
            yield text
