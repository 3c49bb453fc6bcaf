"""Files and directories that are seen whole or not at all."""

import os
import shutil
from pathlib import Path


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
