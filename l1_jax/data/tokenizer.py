"""Text <-> token ids, on Hugging Face `tokenizers`: what all kinds of tokenizer have in common.

A kind of tokenizer.json is a file beside `byte_level.py`, and a line in `tokenizer_kinds.py`.
"""

import abc
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from l1_jax.errors import UserError

# The library takes 120 times a text's size in memory to encode it, so long texts are cut, at a
# place where no token is: between a word and white space or a full-width mark after it, which the
# pre-tokenizers of GPT-2 and its successors never join. A word without an end for `_MOST_CHARS` is
# cut all the same: no memory holds 120 times of it.
PIECE_CHARS = 2048
_MOST_CHARS = 1 << 16
_WORD_END = re.compile(r"[^\W_](?=[ \n\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
_BATCH_PIECES = 512


def cut_text(text: str) -> Iterator[str]:
    """Cuts a text into pieces of about `PIECE_CHARS`, where a word ends."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        match = _WORD_END.search(text, start + PIECE_CHARS, start + _MOST_CHARS)
        end = match.end() if match else start + _MOST_CHARS
        yield text[start:end]
        start = end

    yield text[start:]


class _Piece(NamedTuple):
    """A part of the text of a document, and the number of that."""

    document: int
    text: str


class _EncodedPiece(NamedTuple):
    """The ids of a piece, `[num_tokens]`."""

    document: int
    ids: np.ndarray


def _numbered_pieces(documents: Iterable[str]) -> Iterator[_Piece]:
    for number, document in enumerate(documents):
        for text in cut_text(document):
            yield _Piece(number, text)


class Tokenizer(abc.ABC):
    """Text <-> token ids.

    Text never gives a special id, not even if it spells one: special ids come only from where they
    are asked for, by the attributes.

    Args:
        tokenizer: of the library, of this kind.
        ends: how the tokens at which a text ends are spelt; the first is the end of text.
        beginning: how the token with which a text begins is spelt.

    Attributes:
        vocab_size: the largest id + 1.
        eot_id: the id of the end of text, which separates documents in a store.
        end_ids: the ids at which generation stops; `eot_id` is the first.
        beginning_id: the id that comes before a prompt; None where none does.
        special_ids: the ids that no text gives, those above among them.
        dtype: of ids in a store: little endian, uint16 if the vocabulary allows it, else uint32.
        sha256: of the tokenizer.json, hex.

    Raises:
        LookupError: it has not these tokens, or one that no text of this kind is made of.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, ends: Sequence[str], beginning: str | None = None
    ):
        self._tokenizer = tokenizer

        # This is not part of the file.
        tokenizer.encode_special_tokens = True
        # A given file may ask for either.
        tokenizer.no_truncation()
        tokenizer.no_padding()

        vocab = tokenizer.get_vocab()
        added = tokenizer.get_added_tokens_decoder()

        self.vocab_size = max(vocab.values()) + 1
        self.end_ids = tuple(vocab[end] for end in ends)
        self.eot_id = self.end_ids[0]
        self.beginning_id = None if beginning is None else vocab[beginning]

        special = {token_id for token_id, token in added.items() if token.special}
        special.update(self.end_ids)
        if self.beginning_id is not None:
            special.add(self.beginning_id)

        self.special_ids = tuple(sorted(special))
        self._special = np.array(self.special_ids)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

        # Added tokens are spelt in plain text, all others in the way of the kind.
        self._bytes: dict[int, bytes] = {}
        for spelling, token_id in vocab.items():
            if token_id not in added:
                self._bytes[token_id] = self.bytes_of(spelling)
        for token_id, token in added.items():
            self._bytes[token_id] = b"" if token.special else token.content.encode()

        self._serialized = tokenizer.to_str(pretty=True)
        self.sha256 = hashlib.sha256(self._serialized.encode()).hexdigest()

    @classmethod
    @abc.abstractmethod
    def fits(cls, tokenizer: tokenizers.Tokenizer) -> bool:
        """Whether a tokenizer of the library is of this kind, by its content."""

    @abc.abstractmethod
    def bytes_of(self, spelling: str) -> bytes:
        """The bytes of the text of a token that is spelt so in the vocabulary.

        Raises:
            LookupError: no token of this kind is spelt so.
        """

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json."""
        Path(path).write_text(self._serialized, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of text."""
        return next(self.encode_documents([text])).tolist()

    def encode_documents(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each document in turn, without an end of text.

        Encodes over all cores, in memory that does not grow with the number of documents.

        Returns:
            For each document its ids `[num_tokens]`, of `dtype`.
        """
        encoded = self._encode_pieces(documents)
        for _, pieces in groupby(encoded, key=lambda piece: piece.document):
            yield np.concatenate([piece.ids for piece in pieces])

    def _encode_pieces(self, documents: Iterable[str]) -> Iterator[_EncodedPiece]:
        pieces = _numbered_pieces(documents)
        while batch := list(islice(pieces, _BATCH_PIECES)):
            texts = [piece.text for piece in batch]
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)

            for piece, encoding in zip(batch, encodings, strict=True):
                ids = np.array(encoding.ids, self.dtype)

                # Never of a tokenizer of ours; a given one may have its own ways to an id.
                if np.isin(ids, self._special).any():
                    what = "the tokenizer makes a special token of text"
                    raise UserError(what, "Give a byte-level tokenizer")

                yield _EncodedPiece(piece.document, ids)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps part of a character; none for a special token."""
        # A given tokenizer may leave ids out.
        return self._bytes.get(token_id, b"")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        data = b"".join(map(self.token_bytes, ids))
        return data.decode("utf-8", errors="replace")
