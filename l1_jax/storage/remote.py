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

_MARKERS = ("manifest.json", "checkpoint.json")  # the last that a directory has is its marker
_DELETIONS_AT_ONCE = 32  # where the storage works on several requests at a time
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_stands_for: dict[Path, str] = {}  # local directories, and the URLs whose content they hold


def is_url(path: object) -> bool:
    """Whether `path` is in object storage. To be asked before a `Path` is made of it, which halves
    the slashes."""
    return "://" in str(path)


class Remote:
    """A directory of objects, which are called by their names in it. UserError where the storage
    does not serve us.

    A name may hold `[`, `*` and `?`. Where fsspec gets one name, or deletes, it takes these for a
    pattern; it takes names literally in `*_file`, in `ls` and `find`, and where it puts, gets or
    copies one list onto another.
    """

    def __init__(self, url: str):
        protocol = url.partition("://")[0]
        # A listing kept in memory is blind to what others write; file://, unlike a bucket, has
        # directories to be made.
        options = (
            {"auto_mkdir": True} if protocol in ("file", "local") else {"use_listings_cache": False}
        )
        self.url = url.rstrip("/")
        try:
            self._fs, root = fsspec.url_to_fs(self.url, **options)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            remedy = (
                f'Install it with pip install -e ".[{extra}]"'
                if extra
                else "Install what fsspec names"
            )
            raise UserError(
                f"{url} needs a package that is not installed ({error})", remedy
            ) from error
        except (
            Exception
        ) as error:  # fsspec does not know it; or the storage is asked at once, and refuses
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{url} is in no storage that fsspec knows ({reason})", "Give gs:// or s3://"
            ) from error
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
        inside = [info for info in found if info["name"].rstrip("/") != self._root]
        return {
            PurePath(info["name"]).name: info["size"] if info["type"] == "file" else None
            for info in inside
        }

    def files(self) -> list[str]:
        """The names of all objects, at any depth."""
        with self._asked():
            return sorted(path[len(self._root) + 1 :] for path in self._fs.find(self._root))

    def read_text(self, name: str) -> str | None:
        """The content of an object; None where there is none."""
        with self._asked():
            try:
                return self._fs.cat_file(self._at(name)).decode()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, content: bytes, new: bool = False) -> None:
        """Writes an object; with `new`, FileExistsError where it is there, so that of two who try
        only one succeeds."""
        with self._asked():
            self._fs.pipe_file(self._at(name), content, mode="create" if new else "overwrite")

    def upload(self, directory: Path, pattern: str = "**/*") -> None:
        """Uploads the files of a local directory that fit the pattern, a marker last."""
        for part in _parts(
            p.relative_to(directory).as_posix() for p in directory.glob(pattern) if p.is_file()
        ):
            with self._asked():
                self._fs.put(
                    [str(directory / name) for name in part], [self._at(name) for name in part]
                )

    def download(self, directory: Path, names: Iterable[str]) -> None:
        """Downloads objects into a local directory. An object's name may be any text: UserError
        where it leads out."""
        targets = {name: directory / name for name in names}
        for name in targets:
            if name.startswith("/") or ".." in name.split("/") or "\0" in name:
                what = (
                    f"{self.url} holds an object called {name!r}, which would lie outside "
                    "of a directory"
                )
                raise UserError(what, "Delete it there")
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        if targets:
            with self._asked():
                self._fs.get(
                    [self._at(name) for name in targets],
                    [str(target) for target in targets.values()],
                )

    def copy(self, target: "Remote") -> None:
        """Copies all objects inside the storage, a marker last."""
        for part in _parts(self.files()):
            with self._asked():
                self._fs.copy(
                    [self._at(name) for name in part], [target._at(name) for name in part]
                )

    def delete(self) -> None:
        """Deletes all objects, a marker first; of a file, itself."""
        for part in reversed(_parts(self.files())):
            workers = _DELETIONS_AT_ONCE if self._fs.async_impl else 1

            with self._asked(), ThreadPoolExecutor(workers) as pool:
                list(pool.map(self._delete_file, part))

    def _delete_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a repeated request: the first one did it
            self._fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except Exception as error:  # every storage has errors of its own
            what = (
                f"{self.url} cannot be used ({type(error).__name__}: "
                f"{' '.join(str(error).split()).rstrip('.')})"
            )
            raise UserError(what, "Check the address, the credentials and the network") from error


def _parts(names: Iterable[str]) -> list[list[str]]:
    """The names in the order in which they are to be written, the marker last; what is empty is
    left out."""
    names = list(names)
    split = [
        [name for name in names if name not in _MARKERS],
        *([name] for name in _MARKERS if name in names),
    ]
    return [part for part in split if part]


def scratch(url: str) -> Path:
    """A new local directory for what is on its way from or to `url`; deleted when the command
    ends."""
    path = Path(tempfile.mkdtemp(prefix="l1_jax-"))
    stand_for(path, url)
    on_exit.callback(_forget, path)
    return path


def _forget(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _stands_for.pop(path, None)


def stand_for(path: Path, url: str) -> None:
    """Notes that the local directory `path` holds content of `url`: messages say the URL, see
    `shown`."""
    _stands_for[path] = url


def display_name(path: Path) -> str:
    """How a path is called in messages: by its URL, where it is a local stand-in."""
    for home, url in _stands_for.items():
        if path.is_relative_to(home):
            return "/".join((url, *path.relative_to(home).parts))
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(path))
