"""Damage found: a checkpoint's manifest has the SHA-256 of every file, and of itself."""

import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from l1_jax.checkpoint.mirror import fetch, wants
from l1_jax.checkpoint.names import MANIFEST_FILE
from l1_jax.errors import UserError
from l1_jax.storage.files import CHANGED, find_file_damage, hash_file, read_text, why_not

_MOST_BYTES = 1 << 29  # of a manifest


def hash_files(root: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and SHA-256 of the files `names` under `root`, hashed side by side: hashlib does not hold the GIL."""
    paths = {name: root / name for name in names}
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, paths.values())
        return {
            name: {"bytes": path.stat().st_size, "sha256": sha256}
            for (name, path), sha256 in zip(paths.items(), hashes, strict=True)
        }


def list_files(root: Path) -> list[str]:
    """The names of all files under `root` but the manifest, sorted."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_FILE)


def manifest_text(digests: dict[str, Any]) -> str:
    """The text of a manifest. There is one text for the same files, so that no byte of it can change unseen."""
    files = json.dumps(digests, sort_keys=True)
    whole = {"files": digests, "sha256": hashlib.sha256(files.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True, indent=1) + "\n"


def content_digest(checkpoint: Path) -> str | None:
    """The SHA-256 that stands for all files of a checkpoint, by its manifest; None where that
    cannot be read. Copies have the same, and no two saves have."""
    try:
        return json.loads(read_text(checkpoint / MANIFEST_FILE, _MOST_BYTES))["sha256"]
    except (OSError, UserError, ValueError, LookupError, TypeError, RecursionError):
        return None


def find_damaged_file(
    checkpoint: Path, items: Collection[str] | None = None, share: tuple[int, int] = (0, 1)
) -> str | None:
    """The first damaged file of a checkpoint, and why: `state/params/a (truncated)`; None where all is well.

    Args:
      checkpoint: its directory. Of one in object storage the arrays are downloaded, see `mirror.fetch`.
      items: of the arrays, those to look at: "params", "optimizer"; None is all. The small files always are.
      share: (i, n) looks at the i-th of n equal shares of the files; the manifest is in each.
    """
    try:
        text = read_text(checkpoint / MANIFEST_FILE, _MOST_BYTES)
        files = json.loads(text)["files"]
        if manifest_text(files) != text:
            raise ValueError
        wanted = {name: (files[name]["sha256"], files[name]["bytes"]) for name in sorted(files) if wants(name, items)}
    except OSError as error:
        return f"{MANIFEST_FILE} ({why_not(error)})"
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} ({CHANGED})"
    fetch(checkpoint, items)
    names = list(wanted)[share[0] :: share[1]]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: find_file_damage(checkpoint, name, *wanted[name]), names)
        return next((f"{name} ({why})" for name, why in zip(names, found, strict=True) if why), None)
