"""Directories in object storage, named by a URL: gs://, s3://, or whatever else fsspec opens.

Nothing there is renamed, appended to or locked, and an object is seen whole or not at all. So a
directory is published by its marker: one object, written after all the others and deleted before
them. What has no marker does not exist.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import fsspec

from l1_jax.console import on_exit
from l1_jax.errors import UserError

# The last of these that a directory has is its marker.
_MARKERS = ("manifest.json", "checkpoint.json")

# Where the storage works on several requests at a time.
_DELETIONS_AT_ONCE = 32

# Our extra, in pyproject.toml, that installs what a protocol needs.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

# Local directories, and the URLs whose content they hold.
_stands_for: dict[Path, str] = {}


def is_url(path: object) -> bool:
    """Whether `path` is in object storage.

    To be asked before a `Path` is made of it, which halves the slashes.
    """
    return "://" in str(path)


class Remote:
    """A directory of objects, which are called by their names in it.

    Every method raises UserError where the storage does not serve us.

    A name may hold `[`, `*` and `?`. Where fsspec gets one name, or deletes, it takes these for a
    pattern; it takes names literally in `*_file`, in `ls` and `find`, and where it puts, gets or
    copies one list onto another.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")

        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            # Unlike a bucket, it has directories to be made.
            options = {"auto_mkdir": True}
        else:
            # A listing kept in memory is blind to what others write.
            options = {"use_listings_cache": False}

        try:
            self._fs, root = fsspec.url_to_fs(self.url, **options)
        except ImportError as error:
            remedy = "Install what fsspec names"
            if extra := _EXTRAS.get(protocol):
                remedy = f'Install it with pip install -e ".[{extra}]"'
            what = f"{url} needs a package that is not installed ({error})"
            raise UserError(what, remedy) from error
        except Exception as error:
            # fsspec does not know it; or the storage is asked at once, and refuses.
            what = f"{url} is in no storage that fsspec knows ({_in_one_line(error)})"
            raise UserError(what, "Give gs:// or s3://") from error

        self._root = root.rstrip("/")

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def entries(self) -> dict[str, int | None]:
        """The names right in this directory, with their sizes in bytes; None is a directory."""
        with self._asked():
            try:
                found = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:
                return {}

        sizes = {}
        for info in found:
            # Some storages list the directory itself, too.
            if info["name"].rstrip("/") != self._root:
                name = PurePath(info["name"]).name
                sizes[name] = info["size"] if info["type"] == "file" else None
        return sizes

    def files(self) -> list[str]:
        """The names of all objects, at any depth."""
        with self._asked():
            paths = self._fs.find(self._root)

        below_root = len(self._root) + 1
        return sorted(path[below_root:] for path in paths)

    def read_text(self, name: str) -> str | None:
        """The content of an object; None where there is none."""
        with self._asked():
            try:
                return self._fs.cat_file(self._at(name)).decode()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, content: bytes, new: bool = False) -> None:
        """Writes an object.

        Raises:
            FileExistsError: with `new`, where it is there: of two who try only one succeeds.
        """
        mode = "create" if new else "overwrite"
        with self._asked():
            self._fs.pipe_file(self._at(name), content, mode=mode)

    def upload(self, directory: Path, pattern: str = "**/*") -> None:
        """Uploads the files of a local directory that fit the pattern, a marker last."""
        found = [path for path in directory.glob(pattern) if path.is_file()]
        names = [path.relative_to(directory).as_posix() for path in found]

        for part in _marker_last(names):
            sources = [str(directory / name) for name in part]
            with self._asked():
                self._fs.put(sources, self._all_at(part))

    def download(self, directory: Path, names: Iterable[str]) -> None:
        """Downloads objects into a local directory.

        Raises:
            UserError: also where an object's name, which may be any text, leads out of it.
        """
        names = list(names)
        for name in names:
            leads_out = name.startswith("/") or ".." in name.split("/")
            if leads_out or "\0" in name:
                what = (
                    f"{self.url} holds an object called {name!r}, which would lie outside "
                    "of a directory"
                )
                raise UserError(what, "Delete it there")

        if not names:
            return

        targets = [directory / name for name in names]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)

        with self._asked():
            self._fs.get(self._all_at(names), [str(target) for target in targets])

    def copy(self, target: "Remote") -> None:
        """Copies all objects inside the storage, a marker last."""
        for part in _marker_last(self.files()):
            with self._asked():
                self._fs.copy(self._all_at(part), target._all_at(part))

    def delete(self) -> None:
        """Deletes all objects, a marker first; of a file, itself."""
        workers = _DELETIONS_AT_ONCE if self._fs.async_impl else 1

        for part in reversed(_marker_last(self.files())):
            with self._asked(), ThreadPoolExecutor(workers) as pool:
                list(pool.map(self._delete_file, part))

    def _delete_file(self, name: str) -> None:
        # A request may be repeated: the first one did it.
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _all_at(self, names: Iterable[str]) -> list[str]:
        return [self._at(name) for name in names]

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Has what the storage raises inside end as a UserError."""
        try:
            yield
        except FileExistsError:
            raise
        except Exception as error:
            # Every storage has errors of its own.
            reason = f"{type(error).__name__}: {_in_one_line(error)}"
            what = f"{self.url} cannot be used ({reason})"
            raise UserError(what, "Check the address, the credentials and the network") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _marker_last(names: Iterable[str]) -> list[list[str]]:
    """The names in parts, in the order in which they are to be written; no part is empty."""
    names = list(names)
    others = [name for name in names if name not in _MARKERS]
    markers = [[name] for name in _MARKERS if name in names]
    return [others, *markers] if others else markers


def scratch(url: str) -> Path:
    """A new local directory for what is on its way from or to `url`.

    It is deleted when the command ends.
    """
    path = Path(tempfile.mkdtemp(prefix="l1_jax-"))
    stand_for(path, url)
    on_exit.callback(_forget, path)
    return path


def _forget(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _stands_for.pop(path, None)


def stand_for(path: Path, url: str) -> None:
    """Notes that a local directory holds content of a URL: messages say the URL then.

    See `display_name`.
    """
    _stands_for[path] = url


def display_name(path: Path) -> str:
    """How a path is called in messages: by its URL, where it is a local stand-in."""
    for home, url in _stands_for.items():
        if path.is_relative_to(home):
            return "/".join((url, *path.relative_to(home).parts))

    # A name may hold what steers a terminal.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(path))
