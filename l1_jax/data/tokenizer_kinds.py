"""A tokenizer.json -> a tokenizer of its kind."""

from pathlib import Path
from typing import Protocol

import tokenizers

from l1_jax.data.byte_level import END_OF_TEXT, ByteLevel
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import UserError


class Kind(Protocol):
    """A subclass of `Tokenizer`: it knows a file of its kind, and makes the tokenizer of one."""

    def fits(self, tokenizer: tokenizers.Tokenizer) -> bool: ...

    def __call__(self, tokenizer: tokenizers.Tokenizer) -> Tokenizer: ...


# The first that fits a file is its kind.
KINDS: list[Kind] = [ByteLevel]

# Of a tokenizer.json: the largest vocabularies in use take a twentieth.
_MOST_BYTES = 1 << 29

# What a given tokenizer has to give back unchanged.
_PROBE = (
    "Plain, it's  two\n\n\ttabs 12 É e\u0301 Ж 漢か عر 👩\u200d👩 "
    f"\u2028\x0b\x1c\x00\ufeff\r\n{END_OF_TEXT} "
)


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer.json.

    Raises:
        UserError: it is none of a kind that is known, with an end of text.
    """
    if not Path(path).exists():
        remedy = "Give the path of a tokenizer.json, or one of the words that `tokenizer` takes"
        raise UserError(f"{path} does not exist", remedy)

    try:
        size = Path(path).stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"{size:,} bytes, more than {_MOST_BYTES:,}")

        tokenizer = _make(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:
        # The library raises nothing narrower, and a token may be spelt in other characters.
        what = f"{path} is not a tokenizer.json for bytes, with the token {END_OF_TEXT} ({error})"
        raise UserError(what, "Give one of a byte-level tokenizer") from None

    ids = tokenizer.encode(_PROBE)
    if tokenizer.decode(ids) != _PROBE:
        what = f"the tokenizer {path} does not give every text back"
        raise UserError(what, "Give a byte-level tokenizer")
    return tokenizer


def _make(tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    """The tokenizer of its kind; ValueError where none is known."""
    for kind in KINDS:
        if kind.fits(tokenizer):
            return kind(tokenizer)

    raise ValueError("no part of it makes bytes of text")
