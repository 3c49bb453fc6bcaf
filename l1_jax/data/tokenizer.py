"""Byte-level BPE on Hugging Face `tokenizers`: any Unicode text comes back byte for byte."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from l1_jax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the end of text
_BATCH_CHARS = 1 << 20
_PIECE_CHARS = 1 << 16
_PROBE = f"Plain, it's  two\n\n\ttabs 12 É e\u0301 Ж 漢か عر 👩\u200d👩 \u2028\x0b\x1c\x00\ufeff\r\n{END_OF_TEXT} "


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte -> the byte.

    Source: `bytes_to_unicode` in openai/gpt-2, encoder.py.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_PIECE_END = re.compile(r"\S(?=[ \n])")


def _pieces(text: str, size: int = _PIECE_CHARS) -> Iterator[str]:
    """Cuts a long text where it does not change the tokens: GPT-2's pre-tokenizer never joins a word to the
    white space after it, nor looks back."""
    start = 0
    while len(text) - start > size and (end := _PIECE_END.search(text, start + size)):
        yield text[start : end.end()]
        start = end.end()
    yield text[start:]


class Tokenizer:
    """Text <-> token ids. Text never gives a special id, not even text that spells one.

    Attributes:
        vocab_size: one more than the largest id.
        eot_id: the id of the end-of-text token.
        dtype: the smallest unsigned type, little endian, that holds every id.
        sha256: of the serialised file.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # not part of the file
        tokenizer.no_truncation()  # a given file may ask for either
        tokenizer.no_padding()
        self._serialized = tokenizer.to_str(pretty=True)
        self._added = tokenizer.get_added_tokens_decoder()
        ours = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        self._can_cut = json.loads(self._serialized)["pre_tokenizer"] == ours
        vocab = tokenizer.get_vocab()
        self._tokens = {token_id: token for token, token_id in vocab.items()}
        self.vocab_size, self.eot_id = max(vocab.values()) + 1, vocab[END_OF_TEXT]
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sha256 = hashlib.sha256(self._serialized.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns byte-level BPE. A small corpus may give fewer tokens than asked for.

        Args:
            texts: documents, read once.
            vocab_size: the most tokens it may have, the 256 bytes and end-of-text included.

        Raises:
            UserError: the vocabulary has no room for the bytes and the end of text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocabulary size {vocab_size} is too small", f"Bytes and end of text take {MIN_VOCAB_SIZE}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # type: ignore
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
        return cls(tokenizer)

    @classmethod
    def bytes_only(cls) -> "Tokenizer":
        """A tokenizer without merges: a token a byte."""
        return cls.train([], MIN_VOCAB_SIZE)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json.

        Raises:
            UserError: the file is missing, is no tokenizer, has no end of text, or does not give text back.
        """
        if not Path(path).is_file():
            raise UserError(f"there is no tokenizer file {path}", "Give the path of a tokenizer.json")
        try:
            loaded = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise UserError(
                f"{path} is not a tokenizer.json ({error})", "Give a file that `tokenizers` saved"
            ) from None
        if loaded.token_to_id(END_OF_TEXT) is None:
            raise UserError(f"the tokenizer {path} has no token {END_OF_TEXT}", "Give one that has it")
        tokenizer = cls(loaded)
        ids = tokenizer.encode(_PROBE)
        try:
            exact = tokenizer.decode(ids) == _PROBE and tokenizer.eot_id not in ids
        except KeyError:
            exact = False
        if not exact:
            raise UserError(f"the tokenizer {path} does not give every text back", "Give a byte-level tokenizer")
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json."""
        Path(path).write_text(self._serialized, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end of text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without an end of text."""
        return [ids.tolist() for ids in self.encode_documents(texts)]

    def encode_documents(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each document in turn, of `dtype`; encoded in batches of bounded size over all cores."""
        parts: list[np.ndarray] = []
        for batch in self._batches(documents):
            encodings = self._tokenizer.encode_batch_fast([piece for piece, _ in batch], add_special_tokens=False)
            for encoding, (_, is_last) in zip(encodings, batch, strict=True):
                parts.append(np.array(encoding.ids, self.dtype))
                if is_last:
                    yield np.concatenate(parts)
                    parts = []

    def _batches(self, documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
        """Pieces of documents, each with whether it is the last of its document."""
        batch: list[tuple[str, bool]] = []
        num_chars = 0
        for text in documents:
            remaining = len(text)
            for piece in _pieces(text) if self._can_cut else [text]:
                remaining -= len(piece)
                num_chars += len(piece)
                batch.append((piece, remaining == 0))
                if num_chars >= _BATCH_CHARS:
                    yield batch
                    batch, num_chars = [], 0
        yield batch

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps part of a character; none for a special token."""
        if added := self._added.get(token_id):
            return b"" if added.special else added.content.encode()
        return bytes(_BYTE_OF[char] for char in self._tokens[token_id])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
