"""Byte-level BPE on Hugging Face `tokenizers`: any Unicode text comes back byte for byte."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l1_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the end of text
_MOST_BYTES = 1 << 29  # of a tokenizer.json: the largest vocabularies in use take a twentieth
_PROBE = f"Plain, it's  two\n\n\ttabs 12 É e\u0301 Ж 漢か عر 👩\u200d👩 \u2028\x0b\x1c\x00\ufeff\r\n{END_OF_TEXT} "
# GPT-2's printable stand-in for every byte -> the byte. Source: `bytes_to_unicode` in openai/gpt-2, encoder.py.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
# The library takes 120 times a text's size in memory to encode it, so long ones are cut, where no token is: between a
# word and white space or a full-width mark after it, which the pre-tokenizers of GPT-2 and its successors never join.
# A word without an end for so long is cut all the same: no memory holds 120 times of it.
_PIECE_CHARS, _MOST_CHARS, _BATCH_PIECES = 2048, 1 << 16, 512
_WORD_END = re.compile(r"[^\W_](?=[ \n\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE_CHARS:
        match = _WORD_END.search(text, start + _PIECE_CHARS, start + _MOST_CHARS)
        end = match.end() if match else start + _MOST_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _to_count(texts: Iterable[str]) -> Iterator[str]:
    """The pieces for the trainer, whose time is quadratic in a word's length: where no word ends, it may be cut too."""
    for text in texts:
        for piece in _pieces(text):
            step = 2 * _PIECE_CHARS if len(piece) <= 2 * _PIECE_CHARS else _PIECE_CHARS // 4
            yield from (piece[start : start + step] for start in range(0, len(piece), step))


class Tokenizer:
    """Text <-> token ids. Text never gives a special id (`eot_id`, the end of text), not even if it spells one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # not part of the file
        tokenizer.no_truncation()  # a given file may ask for either
        tokenizer.no_padding()
        vocab, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
        self._bytes = {i: bytes(_BYTE_OF[char] for char in token) for token, i in vocab.items() if i not in added}
        self._bytes |= {i: b"" if token.special else token.content.encode() for i, token in added.items()}
        self.vocab_size, self.eot_id = max(vocab.values()) + 1, vocab[END_OF_TEXT]
        self._special = np.array([self.eot_id, *(i for i, token in added.items() if token.special)])
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self._serialized = tokenizer.to_str(pretty=True)
        self.sha256 = hashlib.sha256(self._serialized.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns byte-level BPE. A small corpus may give fewer tokens than `vocab_size`, which counts them all."""
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore
        symbols: Any = {"special_tokens": [END_OF_TEXT], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **symbols)
        tokenizer.train_from_iterator(_to_count(texts), trainer)
        return cls(tokenizer)

    @classmethod
    def bytes_only(cls) -> "Tokenizer":
        """A tokenizer without merges: a token a byte."""
        return cls.train([], MIN_VOCAB_SIZE)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json; UserError where it is none of a byte-level tokenizer with an end of text."""
        try:
            if (size := Path(path).stat().st_size) > _MOST_BYTES:
                raise ValueError(f"{size:,} bytes, more than {_MOST_BYTES:,}")
            tokenizer = cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises nothing narrower, and a token may be spelt in other characters
            what = f"{path} is not a tokenizer.json for bytes, with the token {END_OF_TEXT} ({error})"
            raise UserError(what, "Give one of a byte-level tokenizer") from None
        ids = tokenizer.encode(_PROBE)
        if tokenizer.decode(ids) != _PROBE:
            raise UserError(f"the tokenizer {path} does not give every text back", "Give a byte-level tokenizer")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json."""
        Path(path).write_text(self._serialized, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of text."""
        return next(self.encode_documents([text])).tolist()

    def encode_documents(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each document in turn, of `dtype`; encoded over all cores, in memory that does not grow."""
        for _, parts in groupby(self._encode_pieces(documents), key=lambda part: part[0]):
            yield np.concatenate([ids for _, ids in parts])

    def _encode_pieces(self, documents: Iterable[str]) -> Iterator[tuple[int, np.ndarray]]:
        pieces = ((number, piece) for number, text in enumerate(documents) for piece in _pieces(text))
        while batch := list(islice(pieces, _BATCH_PIECES)):
            encodings = self._tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (number, _), encoding in zip(batch, encodings, strict=True):
                ids = np.array(encoding.ids, self.dtype)
                if np.isin(ids, self._special).any():  # never of ours; a given one may have its own ways to an id
                    raise UserError("the tokenizer makes a special token of text", "Give a byte-level tokenizer")
                yield number, ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps part of a character; none for a special token."""
        return self._bytes.get(token_id, b"")  # a given tokenizer may leave ids out

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
