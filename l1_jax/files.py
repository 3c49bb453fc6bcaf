"""Files and directories that are seen whole or not at all, and what has become of a file since."""

import hashlib
import os
import shutil
from pathlib import Path

CHANGED, MISSING, TRUNCATED = "sha256 does not match", "missing", "truncated"


def write_text(path: Path, text: str) -> None:
    """Writes a file."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def replace(new: Path, name: Path) -> None:
    """Gives directory `new` the name `name`; what had it before is deleted. If killed between, see `recover`."""
    old = name.with_name(f".old-{name.name}")
    if name.exists():
        shutil.rmtree(old, ignore_errors=True)
        name.rename(old)
    try:
        new.rename(name)
    except OSError:
        recover(name)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(name: Path) -> None:
    """Finishes, or takes back, a `replace` that was interrupted."""
    old = name.with_name(f".old-{name.name}")
    if old.exists() and not name.exists():
        old.rename(name)
    shutil.rmtree(old, ignore_errors=True)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(root: Path, name: str, sha256: str, size: int | None = None) -> str | None:
    """What is wrong with a file under `root` that had this hash, and `size` bytes; None where nothing is."""
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return "a link that leaves its directory"
        if size is not None and path.stat().st_size < size:
            return TRUNCATED
        return None if hash_file(path) == sha256 else CHANGED
    except (OSError, RuntimeError) as error:  # the latter of links that go in a circle
        return why_not(error)


def why_not(error: Exception) -> str:
    """Why a file could not be read, in words."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MISSING
    return f"unreadable: {getattr(error, 'strerror', None) or error}"
