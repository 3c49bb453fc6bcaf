"""A prepared directory: memory-mapped tokens, document boundaries, and the manifest with its hash chain.

The stream of a split is `EOT d1 EOT d2 EOT ... dn EOT`: every text token and the end of every document is a target
exactly once. The stream of an empty split is one EOT. On disk, little endian:

    tokens/<split>.bin         the stream; uint16, or uint32 where the vocabulary is larger than 65536
    tokens/<split>.documents   int64 [n, 2]: where each document ends, in tokens (past its EOT) and in bytes of text
                               (separators not counted)
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import UserError

SPLITS = ("train", "val", "test")
MANIFEST_VERSION = 1


def tokenize_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The stream of some documents in memory, ids [num_tokens] of `tokenizer.dtype`: as a store would hold it."""
    eot = np.array([tokenizer.eot_id], tokenizer.dtype)
    parts = [eot]
    for ids in tokenizer.encode_documents(documents):
        parts += (ids, eot)
    return np.concatenate(parts)


def _store_files(directory: Path, split: str) -> tuple[Path, Path]:
    return directory / "tokens" / f"{split}.bin", directory / "tokens" / f"{split}.documents"


class TokenWriter:
    """Writes the store of one split, a document at a time, into an existing `tokens/`; a context manager.

    Attributes:
        counts: documents, tokens and bytes of text so far, as in the manifest.
    """

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self._paths = _store_files(directory, split)
        self._eot = np.array([tokenizer.eot_id], tokenizer.dtype)
        self.counts = {"documents": 0, "tokens": 1, "bytes": 0}

    def __enter__(self) -> Self:
        self._tokens, self._documents = open(self._paths[0], "wb"), open(self._paths[1], "wb")
        self._tokens.write(self._eot.data)
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens.close()
        self._documents.close()

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        """Appends a document: its ids, of `tokenizer.dtype`, and how many UTF-8 bytes its text has."""
        self._tokens.write(ids.data)
        self._tokens.write(self._eot.data)
        self.counts["documents"] += 1
        self.counts["tokens"] += len(ids) + 1
        self.counts["bytes"] += num_bytes
        self._documents.write(np.array([self.counts["tokens"], self.counts["bytes"]], "<i8").data)


class TokenStore:
    """The tokens of one split.

    Attributes:
        tokens: the stream [num_tokens], memory-mapped, read-only.
        documents: int64 [num_documents, 2], the ends of each document in tokens and in bytes, memory-mapped.
        num_bytes: UTF-8 bytes of the documents' text.
        eot_id: the end-of-text token.
    """

    def __init__(self, directory: Path, split: str, counts: Mapping[str, int], dtype: str, eot_id: int):
        self.num_documents, self.num_tokens = counts["documents"], counts["tokens"]
        self.num_bytes, self.eot_id = counts["bytes"], eot_id
        paths = _store_files(directory, split)
        sizes = (self.num_tokens * np.dtype(dtype).itemsize, self.num_documents * 16)
        for path, size in zip(paths, sizes, strict=True):
            if not path.is_file() or path.stat().st_size != size:
                what = f"{path} is missing, or has not the {size} bytes that follow from manifest.json"
                raise UserError(what, "Run scripts/prepare_data.py again, with --overwrite")
        self.tokens: np.ndarray = np.memmap(paths[0], dtype, mode="r")
        self.documents: np.ndarray = np.empty((0, 2), "<i8")  # an empty file cannot be mapped
        if self.num_documents:
            self.documents = np.memmap(paths[1], "<i8", mode="r").reshape(-1, 2)

    @classmethod
    def open(cls, prepared_dir: str | Path, split: str) -> "TokenStore":
        """The store of a split of a prepared directory; raises as `Prepared` does."""
        return Prepared.open(prepared_dir).store(split)


class Prepared:
    """A prepared directory.

    Attributes:
        manifest: the content of manifest.json.
        tokenizer_path: its tokenizer.json.
        documents_mode: what a document was, "line" or "file".
        data_hash: the head of the hash chain, hex: it changes with anything that the tokens were made of.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.tokenizer_path = directory / "tokenizer.json"
        self.documents_mode: str = manifest["settings"]["documents"]
        self.data_hash: str = manifest["hash_chain"][-1]["hash"]

    @classmethod
    def open(cls, directory: str | Path) -> "Prepared":
        """Reads a prepared directory.

        Raises:
            UserError: it is not one, or of another version.
        """
        path, remedy = Path(directory, "manifest.json"), f"Make {directory} with scripts/prepare_data.py"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if manifest["version"] != MANIFEST_VERSION:
                raise UserError(f"{path} is of version {manifest['version']}, not {MANIFEST_VERSION}", remedy)
            return cls(path.parent, manifest)
        except OSError as error:
            raise UserError(f"{directory} is not a prepared directory: it has no manifest.json", remedy) from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{path} is not the manifest of a prepared directory", remedy) from error

    def store(self, split: str) -> TokenStore:
        """The tokens of "train", "val" or "test"; a missing or truncated file is a `UserError`."""
        manifest = self.manifest
        return TokenStore(self.directory, split, manifest["splits"][split], manifest["dtype"], manifest["eot_id"])


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_chain(links: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each link (a name, and plain JSON data) with a hash over both and the hash of the link before it."""
    chain: list[dict[str, Any]] = []
    previous = ""
    for name, content in links.items():
        previous = hashlib.sha256(json.dumps([previous, name, content], sort_keys=True).encode()).hexdigest()
        chain.append({"link": name, "hash": previous, "content": content})
    return chain
