"""Byte-level BPE on Hugging Face `tokenizers`: any Unicode text comes back byte for byte."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l1_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# Every byte, and the end of text.
MIN_VOCAB_SIZE = 257

# Of a tokenizer.json: the largest vocabularies in use take a twentieth.
_MOST_BYTES = 1 << 29

# What a given tokenizer has to give back unchanged.
_PROBE = (
    "Plain, it's  two\n\n\ttabs 12 É e\u0301 Ж 漢か عر 👩\u200d👩 "
    f"\u2028\x0b\x1c\x00\ufeff\r\n{END_OF_TEXT} "
)

# The library takes 120 times a text's size in memory to encode it, so long texts are cut, at a
# place where no token is: between a word and white space or a full-width mark after it, which the
# pre-tokenizers of GPT-2 and its successors never join. A word without an end for `_MOST_CHARS` is
# cut all the same: no memory holds 120 times of it.
_PIECE_CHARS = 2048
_MOST_CHARS = 1 << 16
_WORD_END = re.compile(r"[^\W_](?=[ \n\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
_BATCH_PIECES = 512


def _make_byte_of() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte -> the byte.

    Source: `bytes_to_unicode` in openai/gpt-2, encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}

    others = [byte for byte in range(256) if byte not in printable]
    for i, byte in enumerate(others):
        byte_of[chr(256 + i)] = byte

    return byte_of


_BYTE_OF = _make_byte_of()


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces of about `_PIECE_CHARS`, where a word ends."""
    start = 0
    while len(text) - start > _PIECE_CHARS:
        match = _WORD_END.search(text, start + _PIECE_CHARS, start + _MOST_CHARS)
        end = match.end() if match else start + _MOST_CHARS
        yield text[start:end]
        start = end

    yield text[start:]


def _pieces_for_trainer(texts: Iterable[str]) -> Iterator[str]:
    """The pieces of all texts, cut again where no word ends.

    The trainer's time is quadratic in a word's length, and what it only counts may be cut anywhere.
    """
    for text in texts:
        for piece in _pieces(text):
            is_long = len(piece) > 2 * _PIECE_CHARS
            step = _PIECE_CHARS // 4 if is_long else 2 * _PIECE_CHARS
            for start in range(0, len(piece), step):
                yield piece[start : start + step]


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
        for text in _pieces(document):
            yield _Piece(number, text)


class Tokenizer:
    """Text <-> token ids.

    Text never gives a special id (such as `eot_id`, the end of text), not even if it spells one.

    Attributes:
        vocab_size: the largest id + 1.
        eot_id: the id of the end of text.
        dtype: of ids in a store: little endian, uint16 if the vocabulary allows it, else uint32.
        sha256: of the tokenizer.json, hex.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer

        # This is not part of the file.
        tokenizer.encode_special_tokens = True
        # A given file may ask for either.
        tokenizer.no_truncation()
        tokenizer.no_padding()

        vocab = tokenizer.get_vocab()
        added = tokenizer.get_added_tokens_decoder()
        special = [token_id for token_id, token in added.items() if token.special]

        self.vocab_size = max(vocab.values()) + 1
        self.eot_id = vocab[END_OF_TEXT]
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self._special = np.array([self.eot_id, *special])

        self._bytes: dict[int, bytes] = {}

        # Added tokens are spelt in plain text, all others in GPT-2's stand-ins.
        for spelling, token_id in vocab.items():
            if token_id not in added:
                self._bytes[token_id] = bytes(_BYTE_OF[char] for char in spelling)
        for token_id, token in added.items():
            self._bytes[token_id] = b"" if token.special else token.content.encode()

        self._serialized = tokenizer.to_str(pretty=True)
        self.sha256 = hashlib.sha256(self._serialized.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns byte-level BPE.

        Args:
            texts: of any length.
            vocab_size: of all tokens together. A small corpus may give fewer.
        """
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = byte_level  # type: ignore
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore

        symbols: Any = {
            "special_tokens": [END_OF_TEXT],
            "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        }
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **symbols)
        tokenizer.train_from_iterator(_pieces_for_trainer(texts), trainer)
        return cls(tokenizer)

    @classmethod
    def bytes_only(cls) -> "Tokenizer":
        """A tokenizer without merges: a token a byte."""
        return cls.train([], MIN_VOCAB_SIZE)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            UserError: it is none of a byte-level tokenizer with an end of text.
        """
        if not Path(path).exists():
            remedy = "Give the path of a tokenizer.json, or one of the words that `tokenizer` takes"
            raise UserError(f"{path} does not exist", remedy)

        try:
            size = Path(path).stat().st_size
            if size > _MOST_BYTES:
                raise ValueError(f"{size:,} bytes, more than {_MOST_BYTES:,}")

            tokenizer = cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:
            # The library raises nothing narrower, and a token may be spelt in other characters.
            what = (
                f"{path} is not a tokenizer.json for bytes, with the token {END_OF_TEXT} ({error})"
            )
            raise UserError(what, "Give one of a byte-level tokenizer") from None

        ids = tokenizer.encode(_PROBE)
        if tokenizer.decode(ids) != _PROBE:
            what = f"the tokenizer {path} does not give every text back"
            raise UserError(what, "Give a byte-level tokenizer")
        return tokenizer

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
