"""JSON Lines -> documents: the string `text` of each line's object."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.data.readers.lines import Drop, Lines, has_surrogates


def read_jsonl(path: Path, file: Any, mode: str, drop: Drop) -> Iterator[str]:
    """The documents of a .jsonl file, a record each in both modes; see `Reader`."""
    lines = Lines(path, file)

    for line in lines:
        is_utf8 = not has_surrogates(line)
        text = _text_of_record(line) if is_utf8 else None

        if text is not None:
            yield text
        else:
            lines.count_broken(line)
            drop("not_json" if is_utf8 else "not_utf8", 1)

    remedy = 'Write one object a line: {"text": "..."}'
    lines.check('not JSON with a string "text"', remedy)


def _text_of_record(line: str) -> str | None:
    """The text of a line; None where the line is broken."""
    if not line.strip():
        return ""  # a blank line is not a broken one

    try:
        record: Any = json.loads(line)
        text: str = record["text"].replace("\r\n", "\n").replace("\r", "\n")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None

    # JSON can spell half a surrogate pair, which is no character.
    return None if has_surrogates(text) else text
