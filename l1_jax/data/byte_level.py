"""Byte-level BPE: any Unicode text comes back byte for byte."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l1_jax.data.tokenizer import PIECE_CHARS, Tokenizer, cut_text

END_OF_TEXT = "<|endoftext|>"

# Every byte, and the end of text.
MIN_VOCAB_SIZE = 257


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


def _pieces_for_trainer(texts: Iterable[str]) -> Iterator[str]:
    """The pieces of all texts, cut again where no word ends.

    The trainer's time is quadratic in a word's length, and what it only counts may be cut anywhere.
    """
    for text in texts:
        for piece in cut_text(text):
            is_long = len(piece) > 2 * PIECE_CHARS
            step = PIECE_CHARS // 4 if is_long else 2 * PIECE_CHARS
            for start in range(0, len(piece), step):
                yield piece[start : start + step]


class ByteLevel(Tokenizer):
    """A tokenizer whose tokens are bytes, each spelt as GPT-2's stand-in."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        ends: Sequence[str] = (END_OF_TEXT,),
        beginning: str | None = None,
    ):
        super().__init__(tokenizer, ends, beginning)

    @classmethod
    def fits(cls, tokenizer: tokenizers.Tokenizer) -> bool:
        """Whether a part of it makes bytes of text, or text of bytes."""
        parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
        return any(re.search(r"\bByteLevel\(", repr(part)) for part in parts)

    def bytes_of(self, spelling: str) -> bytes:
        return bytes(_BYTE_OF[char] for char in spelling)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "ByteLevel":
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
    def bytes_only(cls) -> "ByteLevel":
        """A tokenizer without merges: a token a byte."""
        return cls.train([], MIN_VOCAB_SIZE)
