"""A prepared directory: memory-mapped tokens, and the manifest with its hash chain.

The tokens of a split lie in tokens/<split>.bin, little endian: uint16, or uint32 where the vocabulary is larger than
65536. They are one stream, `EOT d1 EOT d2 EOT ... dn EOT`: every text token and the end of every document is a target
exactly once, and no text gives an EOT. The stream of an empty split is one EOT.
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
from l1_jax.storage.files import CHANGED, cache_home, check_inside, find_file_damage, hash_file, read_text
from l1_jax.storage.remote import Remote, display_name, is_url, scratch, stand_for

SPLITS = ("train", "val", "test")
FOR_TRAINING = ("tokenizer.json", "tokens/train.bin", "tokens/val.bin")
MANIFEST_VERSION = 1
MANIFEST_BYTES = 1 << 29  # the most: a manifest names every file of the corpus
_NAMES = ("manifest.json", "tokenizer.json", *(name.format(s) for s in SPLITS for name in ("{}.txt", "tokens/{}.bin")))


def _stream(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    eot = np.array([tokenizer.eot_id], tokenizer.dtype)
    yield eot
    for ids in tokenizer.encode_documents(documents):
        yield from (ids, eot)


def tokenize_documents(documents: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The stream of some documents in memory, ids [num_tokens] of `tokenizer.dtype`: as a store would hold it."""
    return np.concatenate([*_stream(documents, tokenizer)])


def write_tokens(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> int:
    """Writes the stream of some documents, and returns how many tokens it has."""
    with open(path, "wb") as file:
        return sum(file.write(ids.data) for ids in _stream(documents, tokenizer)) // tokenizer.dtype.itemsize


def documents_at(stream: np.ndarray, eot_id: int, positions: np.ndarray) -> np.ndarray:
    """The number, 0 for the first, of the document to which the token at each of `positions` (1 or more) belongs; its
    EOT is the one after it. Reads the stream once, in parts."""
    before, size = np.full(positions.shape, -1), 1 << 20
    for first in range(0, int(positions.max()), size):
        ends = first + np.flatnonzero(stream[first : first + size] == eot_id)
        before += np.searchsorted(ends, positions)
    return before


class TokenStore(NamedTuple):
    """The stream [num_tokens] of one split, memory-mapped, and how many documents it holds."""

    tokens: np.ndarray
    num_documents: int


class Prepared:
    """A prepared directory. `documents_mode` is what a document was, "line" or "file"; `data_hash`, the head of the
    hash chain, changes with anything that the tokens were made of."""

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory, self.manifest = directory, manifest
        self.tokenizer_path = directory / "tokenizer.json"
        self.documents_mode: str = manifest["settings"]["documents"]
        self.data_hash: str = manifest["hash_chain"][-1]["hash"]
        if manifest["dtype"] not in ("<u2", "<u4"):
            raise ValueError(f"dtype {manifest['dtype']}")
        for counts in (manifest["splits"][split] for split in SPLITS):
            if not all(type(counts[name]) is int and counts[name] >= 0 for name in ("tokens", "documents")):
                raise ValueError("counts that are none")

    @classmethod
    def open(cls, directory: str | Path) -> "Prepared":
        """Reads a prepared directory; UserError where it is not one, or of another version."""
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
        """The tokens of "train", "val" or "test"; a missing or truncated file is a `UserError`."""
        path, counts = self.directory / "tokens" / f"{split}.bin", self.manifest["splits"][split]
        size = counts["tokens"] * np.dtype(self.manifest["dtype"]).itemsize
        if not path.is_file() or path.stat().st_size != size:
            what = f"{display_name(path)} is missing, or has not the {size} bytes that follow from manifest.json"
            raise UserError(what, "Run scripts/prepare_data.py again, with --overwrite")
        return TokenStore(np.memmap(path, self.manifest["dtype"], mode="r"), counts["documents"])

    def stored(self, path: Path, tokenizer_sha256: str) -> np.ndarray | None:
        """The stream of a split, if `path` is its unchanged text in this directory and the tokenizer is the same."""
        is_ours = path.parent.resolve() == self.directory.resolve() and path.stem in SPLITS and path.suffix == ".txt"
        if not is_ours or tokenizer_sha256 != self.manifest["tokenizer_sha256"]:
            return None
        if why := self.damage([path.name]):
            log.warning("%s: %s; it is read as any other text", display_name(self.directory), why)
            return None
        self.check([f"tokens/{path.stem}.bin"])
        return self.store(path.stem).tokens

    def check(self, names: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
        """Raises UserError where the hash chain does not hold, or a file is not the one that it has the hash of.

        Args:
          names: of the files: `tokenizer.json`, `train.txt`, `tokens/train.bin` and so on.
          share: (i, n) looks at the i-th of n shares of them.
        """
        started = time.perf_counter()
        if why := self.damage(names[share[0] :: share[1]]):
            remedy = "Restore it from a copy, or run scripts/prepare_data.py again, with --overwrite"
            raise UserError(f"{display_name(self.directory)} is damaged: {why}", remedy)
        if (seconds := time.perf_counter() - started) > 3:
            log.info("hashed %s in %.0f s: as prepared", display_name(self.directory), seconds)

    def damage(self, names: Sequence[str]) -> str | None:
        """The first damaged one of some files, or else the manifest, and why: `tokens/train.bin (truncated)`."""
        broken = f"manifest.json ({CHANGED})"
        try:
            links = {link["link"]: link["content"] for link in self.manifest["hash_chain"]}
            tokenizer, tokens = links["tokenizer"], links["tokens"]
            copies = {"dtype": tokens["dtype"]} | tokenizer
            if hash_chain(links) != self.manifest["hash_chain"] or copies != {k: self.manifest[k] for k in copies}:
                return broken
            if self.documents_mode != links["cleaning"]["documents"]:
                return broken
            hashes = {f"tokens/{split}.bin": tokens[f"{split}.bin"] for split in SPLITS}
            hashes |= {f"{split}.txt": links["split"][f"{split}.txt"] for split in SPLITS}
            hashes["tokenizer.json"] = tokenizer["tokenizer_sha256"]
            item = np.dtype(tokens["dtype"]).itemsize
            sizes = {f"tokens/{split}.bin": self.manifest["splits"][split]["tokens"] * item for split in SPLITS}
        except (LookupError, TypeError, ValueError):
            return broken
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: find_file_damage(self.directory, name, hashes[name], sizes.get(name)), names)
            return next((f"{name} ({why})" for name, why in zip(names, found, strict=True) if why), None)


def _download(url: str, names: Sequence[str]) -> Path:
    """A directory in the cache that holds `names` of the prepared directory at `url`; OSError where there is none.

    It is called by the hash of the manifest, so a directory that was prepared anew is another one.
    """
    remote = Remote(url)
    if (manifest := remote.read_text("manifest.json")) is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    links = {link["link"]: link["content"] for link in json.loads(manifest)["hash_chain"]}
    hashes = links["split"] | links["tokens"]
    home = cache_home() / hashlib.sha256(manifest.encode()).hexdigest()[:16]
    (home / "tokens").mkdir(parents=True, exist_ok=True)
    stand_for(home, remote.url)
    absent = [name for name in names if not (home / name).is_file()]
    with tempfile.TemporaryDirectory(dir=home, prefix=".") as partial:  # other processes may do the same
        if absent:
            log.info("downloading %s to %s", remote.url, home)
        remote.download(Path(partial), absent)
        Path(partial, "manifest.json").write_text(manifest, encoding="utf-8")
        for name in (*absent, "manifest.json"):
            path = Path(partial, name)
            if path.name in hashes and hash_file(path) != hashes[path.name]:
                what = f"{remote.url}/{name} is not what its manifest.json says"
                raise UserError(what, "Upload it again, or run scripts/prepare_data.py again, with --overwrite")
            path.replace(home / name)
    return home


def download_text(url: str) -> Path:
    """The local path of what is to be evaluated: a prepared directory, one of its texts, or any other text file."""
    parent, _, name = url.rstrip("/").rpartition("/")
    split = name.removesuffix(".txt")
    texts, place = ((split,), parent) if split != name and split in SPLITS else (("test", "val"), url)
    try:
        files = ("tokenizer.json", *(file for split in texts for file in (f"{split}.txt", f"tokens/{split}.bin")))
        home = _download(place, files)
        return home if place == url else home / name
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # not prepared by us
        home = scratch(parent)
        Remote(parent).download(home, [name])
        return home / name


def hash_chain(links: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each link (a name, and plain JSON data) with a hash over both and the hash of the link before it."""
    chain: list[dict[str, Any]] = []
    previous = ""
    for name, content in links.items():
        previous = hashlib.sha256(json.dumps([previous, name, content], sort_keys=True).encode()).hexdigest()
        chain.append({"link": name, "hash": previous, "content": content})
    return chain
