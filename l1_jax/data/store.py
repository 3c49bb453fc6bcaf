"""A prepared directory: memory-mapped tokens, and the manifest with its hash chain.

The tokens of a split lie in tokens/<split>.bin, little endian: uint16, or uint32 where the
vocabulary is larger than 65536. They are one stream, `EOT d1 EOT d2 EOT ... dn EOT`. So every text
token and the end of every document is a target exactly once, and no text gives an EOT. The stream
of an empty split is one EOT.
"""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from l1_jax.console import log
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import UserError
from l1_jax.storage.files import (
    CHANGED,
    cache_home,
    check_inside,
    find_file_damage,
    hash_file,
    read_text,
)
from l1_jax.storage.remote import Remote, display_name, is_url, scratch, stand_for

SPLITS = ("train", "val", "test")
FOR_TRAINING = ("tokenizer.json", "tokens/train.bin", "tokens/val.bin")
MANIFEST_VERSION = 1
MANIFEST_BYTES = 1 << 29  # the most: a manifest names every file of the corpus

_TEXTS = tuple(f"{split}.txt" for split in SPLITS)
_TOKENS = tuple(f"tokens/{split}.bin" for split in SPLITS)
_NAMES = ("manifest.json", "tokenizer.json", *_TEXTS, *_TOKENS)
_SCAN_TOKENS = 1 << 20  # of a stream that is searched, at once
_SLOW_SECONDS = 3  # of hashing: longer is worth a line of the log


def _stream(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The parts of a stream: an EOT, and after each document one more."""
    eot = np.array([tokenizer.eot_id], tokenizer.dtype)
    yield eot
    for ids in tokenizer.encode_documents(documents):
        yield ids
        yield eot


def tokenize_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The stream of some documents in memory, as a store would hold it.

    Returns:
        ids `[num_tokens]` of `tokenizer.dtype`.
    """
    parts = list(_stream(documents, tokenizer))
    return np.concatenate(parts)


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> int:
    """Writes the stream of some documents, and returns how many tokens it has."""
    num_bytes = 0
    with open(path, "wb") as file:
        for ids in _stream(documents, tokenizer):
            num_bytes += file.write(ids.data)

    return num_bytes // tokenizer.dtype.itemsize


def documents_at(stream: np.ndarray, eot_id: int, positions: np.ndarray) -> np.ndarray:
    """The number of the document to which each of some tokens belongs; 0 is the first.

    The EOT of a document is the one after it. Reads the stream once, in parts.

    Args:
        stream: token ids `[num_tokens]`.
        eot_id: the id of the EOT.
        positions: of the tokens in the stream, each 1 or more, of any shape.

    Returns:
        Numbers in the shape of `positions`.
    """
    # The stream begins with an EOT before document 0.
    documents = np.full(positions.shape, -1)

    for first in range(0, int(positions.max()), _SCAN_TOKENS):
        part = stream[first : first + _SCAN_TOKENS]
        ends = first + np.flatnonzero(part == eot_id)
        documents += np.searchsorted(ends, positions)
    return documents


class TokenStore(NamedTuple):
    """The stream `[num_tokens]` of one split, memory-mapped, and how many documents it holds."""

    tokens: np.ndarray
    num_documents: int


class _Expected(NamedTuple):
    """What the manifest says of a file."""

    sha256: str
    num_bytes: int | None  # None where the manifest does not say


class Prepared:
    """A prepared directory.

    Attributes:
        directory: where its files lie on the local disk.
        manifest: the content of manifest.json.
        tokenizer_path: of its tokenizer.json.
        documents_mode: what a document was, "line" or "file".
        data_hash: the head of the hash chain; changes with anything that the tokens were made of.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.tokenizer_path = directory / "tokenizer.json"
        self.documents_mode: str = manifest["settings"]["documents"]
        self.data_hash: str = manifest["hash_chain"][-1]["hash"]

        if manifest["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"dtype {manifest['dtype']}")
        for split in SPLITS:
            counts = manifest["splits"][split]
            if not (_is_count(counts["tokens"]) and _is_count(counts["documents"])):
                raise ValueError("counts that are none")

    @classmethod
    def open(cls, directory: str | Path) -> "Prepared":
        """Reads a prepared directory, or the address of one in a bucket.

        Raises:
            UserError: it is not one, or of another version.
        """
        path = Path(directory, "manifest.json")
        try:
            if is_url(directory):
                path = _download(str(directory), FOR_TRAINING) / path.name
            check_inside(path.parent, *_NAMES)

            manifest = json.loads(read_text(path, MANIFEST_BYTES))
            if manifest["version"] != MANIFEST_VERSION:
                raise ValueError(f"version {manifest['version']}, not {MANIFEST_VERSION}")
            return cls(path.parent, manifest)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"not one of ours: {error}"
            what = f"{directory} is not a prepared directory ({path.name}: {reason})"
            raise UserError(what, "Make one with scripts/prepare_data.py") from error

    def store(self, split: str) -> TokenStore:
        """The tokens of "train", "val" or "test".

        Raises:
            UserError: the file is missing or truncated.
        """
        path = self.directory / "tokens" / f"{split}.bin"
        counts = self.manifest["splits"][split]
        dtype = self.manifest["dtype"]

        size = counts["tokens"] * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            what = (
                f"{display_name(path)} is missing, "
                f"or has not the {size} bytes that follow from manifest.json"
            )
            raise UserError(what, "Run scripts/prepare_data.py again, with `overwrite`")

        tokens = np.memmap(path, dtype, mode="r")
        return TokenStore(tokens, counts["documents"])

    def stored(self, path: Path, tokenizer_sha256: str) -> np.ndarray | None:
        """The stream of a text that was prepared already; None where it has to be made.

        It is there if `path` is the unchanged text of a split in this directory, and the tokenizer
        is the same.
        """
        is_here = path.parent.resolve() == self.directory.resolve()
        is_text_of_split = path.stem in SPLITS and path.suffix == ".txt"
        if not (is_here and is_text_of_split):
            return None
        if tokenizer_sha256 != self.manifest["tokenizer_sha256"]:
            return None

        why = self.find_damage([path.name])
        if why is not None:
            log.warning("%s: %s; it is read as any other text", display_name(self.directory), why)
            return None

        self.check([f"tokens/{path.stem}.bin"])
        return self.store(path.stem).tokens

    def check(self, names: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
        """Checks that the hash chain holds, and files against their hashes in it.

        Args:
            names: of the files: `tokenizer.json`, `train.txt`, `tokens/train.bin` and so on.
            share: (i, n) looks at the i-th of n shares of them.

        Raises:
            UserError: one of them is not what it was.
        """
        index, num_shares = share
        started = time.perf_counter()

        why = self.find_damage(names[index::num_shares])
        if why is not None:
            remedy = (
                "Restore it from a copy, or run scripts/prepare_data.py again, with `overwrite`"
            )
            raise UserError(f"{display_name(self.directory)} is damaged: {why}", remedy)

        seconds = time.perf_counter() - started
        if seconds > _SLOW_SECONDS:
            log.info("hashed %s in %.0f s: as prepared", display_name(self.directory), seconds)

    def find_damage(self, names: Sequence[str]) -> str | None:
        """The first damaged one of some files, or else the manifest, and why; None if all is well.

        It reads like `tokens/train.bin (truncated)`.
        """
        try:
            expected = self._expected_files()
        except (LookupError, TypeError, ValueError):
            return f"manifest.json ({CHANGED})"

        def find_damage(name: str) -> str | None:
            sha256, num_bytes = expected[name]
            return find_file_damage(self.directory, name, sha256, num_bytes)

        # Hashing leaves Python's lock, so threads use all cores.
        with ThreadPoolExecutor() as pool:
            for name, why in zip(names, pool.map(find_damage, names), strict=True):
                if why:
                    return f"{name} ({why})"
        return None

    def _expected_files(self) -> dict[str, _Expected]:
        """What the hash chain says of each file, by name.

        Raises:
            LookupError, TypeError, ValueError: the manifest was changed.
        """
        chain = self.manifest["hash_chain"]
        links = {link["link"]: link["content"] for link in chain}
        if hash_chain(links) != chain:
            raise ValueError("the hash chain does not hold")

        # What the manifest repeats outside of the chain must be what stands in it.
        tokenizer = links["tokenizer"]
        tokens = links["tokens"]
        copies = {"dtype": tokens["dtype"]} | tokenizer
        if copies != {name: self.manifest[name] for name in copies}:
            raise ValueError("a copy differs from the hash chain")
        if self.documents_mode != links["cleaning"]["documents"]:
            raise ValueError("another way to cut documents than in the hash chain")

        item_bytes = np.dtype(tokens["dtype"]).itemsize
        expected = {"tokenizer.json": _Expected(tokenizer["tokenizer_sha256"], None)}
        for split in SPLITS:
            num_bytes = self.manifest["splits"][split]["tokens"] * item_bytes
            expected[f"tokens/{split}.bin"] = _Expected(tokens[f"{split}.bin"], num_bytes)
            expected[f"{split}.txt"] = _Expected(links["split"][f"{split}.txt"], None)
        return expected


def _is_count(value: Any) -> bool:
    # Not isinstance, to which `true` is an int too.
    return type(value) is int and value >= 0


def _download(url: str, names: Sequence[str]) -> Path:
    """A directory in the cache that holds `names` of the prepared directory at `url`.

    It is called by the hash of the manifest, so a directory that was prepared anew is another one.

    Raises:
        OSError: there is none.
        UserError: a file is not what its manifest says.
    """
    remote = Remote(url)
    manifest = remote.read_text("manifest.json")
    if manifest is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    links = {link["link"]: link["content"] for link in json.loads(manifest)["hash_chain"]}
    hashes = links["split"] | links["tokens"]

    home = cache_home() / hashlib.sha256(manifest.encode()).hexdigest()[:16]
    (home / "tokens").mkdir(parents=True, exist_ok=True)
    stand_for(home, remote.url)

    absent = [name for name in names if not (home / name).is_file()]
    if absent:
        log.info("downloading %s to %s", remote.url, home)

    # Other processes may do the same. A file gets its name when it is whole.
    with tempfile.TemporaryDirectory(dir=home, prefix=".") as partial:
        remote.download(Path(partial), absent)
        Path(partial, "manifest.json").write_text(manifest, encoding="utf-8")

        for name in (*absent, "manifest.json"):
            path = Path(partial, name)
            if path.name in hashes and hash_file(path) != hashes[path.name]:
                what = f"{remote.url}/{name} is not what its manifest.json says"
                remedy = "Upload it again, or run scripts/prepare_data.py again, with `overwrite`"
                raise UserError(what, remedy)
            path.replace(home / name)
    return home


def download_text(url: str) -> Path:
    """Downloads what is to be evaluated, and returns where it lies.

    It may be a prepared directory, one of its texts, or any other text file.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    split = name.removesuffix(".txt")
    is_text_of_split = name != split and split in SPLITS

    place = parent if is_text_of_split else url
    names = ["tokenizer.json"]
    for wanted in (split,) if is_text_of_split else ("test", "val"):
        names += [f"{wanted}.txt", f"tokens/{wanted}.bin"]

    try:
        home = _download(place, names)
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # not prepared by us
        home = scratch(parent)
        Remote(parent).download(home, [name])
        return home / name
    return home / name if is_text_of_split else home


def hash_chain(links: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The chain of some links, each a name and plain JSON data.

    Returns:
        Each link with a hash over both and the hash of the link before it.
    """
    chain: list[dict[str, Any]] = []
    previous = ""
    for name, content in links.items():
        serialized = json.dumps([previous, name, content], sort_keys=True)
        previous = hashlib.sha256(serialized.encode()).hexdigest()
        chain.append({"link": name, "hash": previous, "content": content})
    return chain
