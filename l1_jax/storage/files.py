"""Files and directories that are seen whole or not at all; what is read has a limit, and no link
leads out."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.errors import UserError

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}]*\})")


def expand_user_path(path: str, name: str) -> str:
    """The path that a user wrote as `name`, a key or a flag, with a leading `~` or `~user` as a
    shell expands it.

    A URL is left alone. UserError where a user is unknown, or a variable is not expanded, so that
    no directory is made that is called `$HOME`. A file that is there under such a name is meant, if
    no variable is called so.
    """
    if "://" in path:
        return path

    expanded = os.path.expanduser(path)
    is_there = _exists(expanded)

    if expanded.startswith("~") and not is_there:
        what = f"{name} is {path!r}, and {path.partition('/')[0]} is no user's home"
        raise UserError(what, "Write the path out")

    for variable in _VARIABLE.finditer(path):
        if variable[1].strip("{}") in os.environ or not is_there:
            what = f"{name} is {path!r}, and {variable[0]} in it is not expanded"
            raise UserError(
                what,
                "Write the path out, or let the shell do it: on the command line, without "
                "single quotes",
            )

    return expanded


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # NUL, or half a surrogate pair: said elsewhere
        return False


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a UTF-8 file; UserError where it is longer than `most_bytes`, or not text."""
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UserError(
            f"{path} is longer than {most_bytes:,} bytes", "Give the file that was meant"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise UserError(what, "Save the file as UTF-8") from None


def read_json(path: Path, most_bytes: int) -> dict[str, Any]:
    """Reads an object from a JSON file; UserError as with `read_text`, or where it holds none."""
    try:
        content = json.loads(read_text(path, most_bytes))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})", "Restore it, or make it anew") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object)", "Restore it, or make it anew")
    return content


def check_inside(root: Path, *names: str) -> None:
    """Raises UserError where one of the files `names` of directory `root` lies outside of it, by
    way of a link. `root` may be a link itself."""
    home = os.path.realpath(root)
    for path in (root / name for name in names):
        if not Path(os.path.realpath(path)).is_relative_to(home):
            raise UserError(
                f"{path} lies outside of {root}, by way of a link", "Put there what it leads to"
            )


def cache_home() -> Path:
    """Where lies what can be had again: L1_CACHE_DIR, else `l1_jax` in XDG_CACHE_HOME or ~/.cache.
    RuntimeError where the user has no home."""
    root = os.environ.get("L1_CACHE_DIR") or Path(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "l1_jax"
    )
    return Path(root).expanduser()


def delete(path: Path) -> None:
    """Deletes a directory; of a link, the link and nothing that it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


CHANGED, MISSING, TRUNCATED = "sha256 does not match", "missing", "truncated"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of what is done meanwhile the name of the file: a full disk's has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link there would be followed
    with naming(path), open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def replace(new: Path, name: Path) -> None:
    """Gives directory `new` the name `name`; what had it before is deleted. If killed between, see
    `recover`."""
    old = name.with_name(f".old-{name.name}")
    if name.exists() or name.is_symlink():
        delete(old)
        name.rename(old)
    try:
        new.rename(name)
    except OSError:
        recover(name)
        raise
    delete(old)


def recover(name: Path) -> None:
    """Finishes, or takes back, a `replace` that was interrupted."""
    old = name.with_name(f".old-{name.name}")
    if old.exists() and not old.is_symlink() and not name.exists():  # we leave no link there
        old.rename(name)
    delete(old)


def can_be_renamed(directory: Path) -> bool:
    """Whether a directory may get another name: not a mount point, and not where its parent is
    read-only."""
    return os.access(directory.parent, os.W_OK | os.X_OK) and not _is_mount(directory)


def _is_mount(path: Path) -> bool:
    """Whether something is mounted at `path`. Python's own answer misses what is mounted from the
    same disk."""
    if os.path.ismount(path):
        return True

    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False

    # The fifth field; white space and backslashes in it are octal, as in `\\040`.
    places = (line.split()[4] for line in lines)
    unescaped = (
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), place) for place in places
    )
    return os.fsencode(path) in unescaped


def fill(new: Path, directory: Path, last: str) -> None:
    """Gives a directory that cannot be renamed the content of `new`, which is on the same disk:
    file by file, `last` at the end. What has one of their names is deleted. If killed between, see
    `finish_fill`."""
    new.rename(_ready(new))
    finish_fill(new, directory, last)


def finish_fill(new: Path, directory: Path, last: str) -> None:
    """Finishes a `fill` that was interrupted."""
    ready = _ready(new)
    if ready.is_symlink():  # we leave no link there
        return

    if (ready / last).is_file():
        # First, for without it the directory is none.
        (directory / last).unlink(missing_ok=True)

        for path in [path for path in ready.iterdir() if path.name != last]:
            old = directory / path.name
            if old.is_dir():
                delete(old)
            else:
                old.unlink(missing_ok=True)
            path.rename(old)

        (ready / last).rename(directory / last)

    with contextlib.suppress(OSError):  # it is not there, or holds what we did not make
        ready.rmdir()


def _ready(new: Path) -> Path:
    return new.with_suffix(".ready")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file_damage(root: Path, name: str, sha256: str, size: int | None = None) -> str | None:
    """What is wrong with a file under `root` that had this hash, and `size` bytes; None where
    nothing is."""
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
