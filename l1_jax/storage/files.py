"""Files and directories that are seen whole or not at all.

What is read has a limit, and no link leads out of its directory.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from l1_jax.errors import UserError

# What can be wrong with a file, in words.
CHANGED = "sha256 does not match"
MISSING = "missing"
TRUNCATED = "truncated"

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[^}]*\})")


def expand_user_path(path: str, name: str) -> str:
    """The path that a user wrote, with a leading `~` or `~user` as a shell expands it.

    A file that is there under a name with `~` or `$` in it is meant, if no variable is called so.

    Args:
        path: as written. A URL is left alone.
        name: of the key or flag, for messages.

    Raises:
        UserError: a user is unknown, or a variable is not expanded: no directory is made that is
            called `$HOME`.
    """
    if "://" in path:
        return path

    expanded = os.path.expanduser(path)
    is_there = _exists(expanded)

    if expanded.startswith("~") and not is_there:
        what = f"{name} is {path!r}, and {path.partition('/')[0]} is no user's home"
        raise UserError(what, "Write the path out")

    for variable in _VARIABLE.finditer(path):
        is_set = variable[1].strip("{}") in os.environ
        if is_set or not is_there:
            what = f"{name} is {path!r}, and {variable[0]} in it is not expanded"
            remedy = (
                "Write the path out, or let the shell do it: on the command line, without "
                "single quotes"
            )
            raise UserError(what, remedy)

    return expanded


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:
        # NUL, or half a surrogate pair: said elsewhere.
        return False


def read_text(path: Path, most_bytes: int) -> str:
    """Reads a UTF-8 file.

    Raises:
        UserError: it is longer than `most_bytes`, or not text.
    """
    with open(path, "rb") as file:
        data = file.read(most_bytes + 1)

    if len(data) > most_bytes:
        what = f"{path} is longer than {most_bytes:,} bytes"
        raise UserError(what, "Give the file that was meant")

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise UserError(what, "Save the file as UTF-8") from None


def read_json(path: Path, most_bytes: int) -> dict[str, Any]:
    """Reads an object from a JSON file.

    Raises:
        UserError: as with `read_text`, or it holds no object.
    """
    remedy = "Restore it, or make it anew"
    try:
        content = json.loads(read_text(path, most_bytes))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})", remedy) from None

    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object)", remedy)
    return content


def check_inside(root: Path, *names: str) -> None:
    """Checks that files lie in their directory, and not behind a link that leads out of it.

    Args:
        root: the directory; it may be a link itself.
        names: of the files, relative to it.

    Raises:
        UserError: one of them lies outside.
    """
    home = os.path.realpath(root)
    for name in names:
        path = root / name
        if not Path(os.path.realpath(path)).is_relative_to(home):
            what = f"{path} lies outside of {root}, by way of a link"
            raise UserError(what, "Put there what it leads to")


def cache_home() -> Path:
    """The directory of what can be had again.

    L1_CACHE_DIR; without it `l1_jax` in XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get("L1_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()

    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches, "l1_jax").expanduser()


def delete(path: Path) -> None:
    """Deletes a directory; of a link, the link and nothing that it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError that is raised inside the name of the file: a full disk's has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file, which is seen whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")

    # A link there would be followed.
    partial.unlink(missing_ok=True)

    with naming(path), open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 file to be written bit by bit. It is seen whole, or after an error not at all."""
    # Another process may write the same file.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace(new: Path, name: Path) -> None:
    """Gives directory `new` the name `name`; what had it before is deleted.

    If the process is killed in between, `recover` finishes it or takes it back.
    """
    old = _set_aside_as(name)
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
    old = _set_aside_as(name)

    # We leave no link there.
    is_ours = old.exists() and not old.is_symlink()
    if is_ours and not name.exists():
        old.rename(name)

    delete(old)


def _set_aside_as(name: Path) -> Path:
    return name.with_name(f".old-{name.name}")


def can_be_renamed(directory: Path) -> bool:
    """Whether a directory may get another name.

    A mount point may not, nor may a directory whose parent is read-only.
    """
    return os.access(directory.parent, os.W_OK | os.X_OK) and not _is_mount(directory)


def _is_mount(path: Path) -> bool:
    """Whether something is mounted at `path`.

    Python's own answer misses what is mounted from the same disk.
    """
    if os.path.ismount(path):
        return True

    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        # Not Linux.
        return False

    # The mount point is the fifth field; white space and backslashes are octal in it: `\\040`.
    for line in lines:
        escaped = line.split()[4]
        mount_point = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), escaped)
        if mount_point == os.fsencode(path):
            return True

    return False


def fill(new: Path, directory: Path, last: str) -> None:
    """Gives a directory that cannot be renamed the content of another one, file by file.

    What has one of the new names is deleted. If the process is killed in between, `finish_fill`
    goes on.

    Args:
        new: the directory that has the content, on the same disk.
        directory: the one to be filled.
        last: the name of the file that is put there at the end.
    """
    new.rename(_ready(new))
    finish_fill(new, directory, last)


def finish_fill(new: Path, directory: Path, last: str) -> None:
    """Finishes a `fill` that was interrupted."""
    ready = _ready(new)

    # We leave no link there.
    if ready.is_symlink():
        return

    if (ready / last).is_file():
        # First, for without it the directory is none.
        (directory / last).unlink(missing_ok=True)

        for path in list(ready.iterdir()):
            if path.name != last:
                _move_over(path, directory / path.name)

        (ready / last).rename(directory / last)

    # It is not there, or holds what we did not make.
    with contextlib.suppress(OSError):
        ready.rmdir()


def _move_over(path: Path, target: Path) -> None:
    if target.is_dir():
        delete(target)
    else:
        target.unlink(missing_ok=True)
    path.rename(target)


def _ready(new: Path) -> Path:
    """What `fill` calls a directory that is whole, and from which files may be gone already."""
    return new.with_suffix(".ready")


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_file_damage(root: Path, name: str, sha256: str, size: int | None = None) -> str | None:
    """What is wrong with a file; None where nothing is.

    Args:
        root: the directory in which it has to lie.
        name: of the file, relative to it.
        sha256: that it had, hex.
        size: that it had, in bytes, if that is known.
    """
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            return "a link that leaves its directory"

        # The size costs nothing, and tells a truncated file from one that was changed.
        if size is not None and path.stat().st_size < size:
            return TRUNCATED

        return None if hash_file(path) == sha256 else CHANGED
    except (OSError, RuntimeError) as error:
        # The latter is raised of links that go in a circle.
        return why_not(error)


def why_not(error: Exception) -> str:
    """Why a file could not be read, in words."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MISSING
    return f"unreadable: {getattr(error, 'strerror', None) or error}"
