"""A run directory in object storage, and the local one that stands for it: kept alike.

The run works on the local directory. What differs in object storage: the best model is
`best_model-<step>`, so that a new one is whole before the old one goes.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from l1_jax.checkpoint.names import (
    ARRAYS,
    BEST,
    INFO_FILE,
    LOG_DIRECTORIES,
    ORIGIN_FILE,
    RUN_FILE,
    is_remote_best,
    is_run_checkpoint,
    remote_name,
)
from l1_jax.errors import UserError
from l1_jax.storage.files import write_text
from l1_jax.storage.remote import Remote, scratch

# URL -> the local directory that stands for it.
_opened: dict[str, Path] = {}


class Mirror:
    """A local directory that stands for a run directory in object storage: checkpoints in it have
    all but arrays.

    Attributes:
        remote: the run directory.
        home: the local directory.
        start: the start of the run that this process belongs to, as run.json names it.
    """

    def __init__(self, url: str, names: Collection[str]):
        """Downloads the small files of the checkpoints.

        Args:
            url: of the run directory.
            names: what else is downloaded: files, or checkpoints that no run named.
        """
        self.remote = Remote(url)
        self.home = scratch(self.remote.url)
        self.start = ""
        _opened[self.remote.url] = self.home

        # What is there of a run, finished or not.
        self._there: set[str] = set()

        # Size and time of the logs that are there.
        self._sent: dict[str, tuple[int, int]] = {}

        entries = self.remote.entries()
        is_run = RUN_FILE in entries

        for name, size in entries.items():
            if name in names and size is not None:
                self.remote.download(self.home, [name])
                self._there.add(name)
            elif name in LOG_DIRECTORIES:
                (self.home / name).mkdir()
                self._there.add(name)
            elif name in names or is_run_checkpoint(name):
                is_whole = self._download_checkpoint(name)
                # What is cut, and was not left by a run, is not ours to delete.
                if is_whole or is_run:
                    self._there.add(name)

        self._name_best()

        # What run.json said when this start looked.
        self._found = (self.home / RUN_FILE).read_text() if RUN_FILE in self._there else None

    def _download_checkpoint(self, name: str) -> bool:
        """Downloads the small files of a checkpoint; False where it is none, or an interrupted
        one."""
        place = self.remote / name
        home = self.home / name

        # An empty file is not worth a download, but for the marker, which may be damaged so.
        files = place.entries()
        small = [file for file, size in files.items() if size]
        if files.get(INFO_FILE) == 0:
            small.append(INFO_FILE)

        if INFO_FILE not in small:
            return False

        place.download(home, small)
        (home / ORIGIN_FILE).write_text(place.url)
        return True

    def _name_best(self) -> None:
        """Gives the newest `best_model-<step>` the name that a best model has on a disk."""
        bests = {}
        for path in self.home.iterdir():
            if is_remote_best(path.name) and (path / INFO_FILE).is_file():
                bests[_step(path)] = path

        if bests:
            newest = bests[max(bests)]
            if newest.name != BEST:
                shutil.copytree(newest, self.home / BEST, dirs_exist_ok=True)

    def take(self, start: str) -> None:
        """Makes the storage follow what was done to the local directory at the `start` of a run.

        Raises:
            UserError: another start did so since this one looked.
        """
        self.start = start
        content = (self.home / RUN_FILE).read_bytes()
        is_new = RUN_FILE not in self._there

        try:
            if self.remote.read_text(RUN_FILE) != self._found:
                raise FileExistsError

            self.remote.write(RUN_FILE, content, new=is_new)
        except FileExistsError as error:
            what = f"another run has just begun in {self.remote.url}"
            raise UserError(what, "Start a run once, or set another training.output_dir") from error

        self.sync()
        self.send_logs()

    def send_arrays(self, partial: Path, name: str) -> None:
        """Uploads what is here of a checkpoint's arrays, and deletes it."""
        self._check_ours()
        self._place(name, partial).upload(partial, f"{ARRAYS}/**/*")
        shutil.rmtree(partial / ARRAYS)

    def publish(self, partial: Path, name: str) -> None:
        """Uploads the small files of a checkpoint, whose arrays are all there: now it exists."""
        # Before the marker, so that no checkpoint is ahead of its metrics.
        self.send_logs()

        place = self._place(name, partial)
        place.upload(partial, "*")
        (partial / ORIGIN_FILE).write_text(place.url)

    def sync(self) -> None:
        """Makes the storage follow renames, copies and deletions of whole checkpoints and files in
        `home`."""
        now = set()

        for path in self.home.iterdir():
            if path.name.startswith("."):
                continue

            if not (path / INFO_FILE).is_file():
                now.add(path.name)
            elif path.name == BEST or not is_remote_best(path.name):
                now.add(self._follow(path))

        # In this order `metrics.jsonl` goes after the checkpoints.
        for name in sorted(self._there - now):
            (self.remote / name).delete()

        self._there = now

    def _follow(self, checkpoint: Path) -> str:
        """Has a checkpoint in storage under the name that it has here; returns that name there."""
        place = self._place(checkpoint.name, checkpoint)
        origin = (checkpoint / ORIGIN_FILE).read_text()

        if origin != place.url:
            # What an interrupted copy left.
            place.delete()

            Remote(origin).copy(place)
            write_text(checkpoint / ORIGIN_FILE, place.url)

        return place.url.rpartition("/")[2]

    def send_logs(self) -> None:
        """Uploads what changed of all that is not in a checkpoint."""
        self._check_ours()

        for path in self.home.rglob("*"):
            name = path.relative_to(self.home).as_posix()
            top = self.home / name.partition("/")[0]

            if name.startswith(".") or (top / INFO_FILE).is_file() or not path.is_file():
                continue

            # It may go meanwhile: a file that W&B needs no more.
            with contextlib.suppress(FileNotFoundError):
                self._send_log(path, name)

    def _send_log(self, path: Path, name: str) -> None:
        stamp = (path.stat().st_size, path.stat().st_mtime_ns)

        if self._sent.get(name) != stamp:
            # Read at once, for the file may grow.
            self.remote.write(name, path.read_bytes())
            self._sent[name] = stamp

    def _check_ours(self) -> None:
        """Raises UserError where another start has taken over: nothing locks a bucket."""
        if self.start not in (self.remote.read_text(RUN_FILE) or ""):
            what = f"another start of the run has taken over {self.remote.url}"
            remedy = "Let it run, or stop it and run the same command again, with `resume`"
            raise UserError(what, remedy)

    def _place(self, name: str, checkpoint: Path) -> Remote:
        return self.remote / remote_name(name, _step(checkpoint))


def _step(checkpoint: Path) -> int:
    """The step of a checkpoint; of a damaged one the number in its name, for so is all of it."""
    try:
        return json.loads((checkpoint / INFO_FILE).read_text())["step"]
    except (ValueError, LookupError, TypeError):
        number = re.search(r"\d+", checkpoint.name)
        return int(number[0]) if number else 0


def local(url: str) -> Path:
    """The local stand-in for a run directory, or for a checkpoint, that may be there or not."""
    url = url.rstrip("/")

    for known, home in _opened.items():
        if f"{url}/".startswith(f"{known}/") and home.exists():
            return home / url[len(known) + 1 :]

    parent, _, name = url.rpartition("/")
    is_named_so = is_run_checkpoint(name.removesuffix(".pt"))
    is_run = not is_named_so and Remote(url).read_text(INFO_FILE) is None

    if is_run:
        return Mirror(url, names=()).home

    return Mirror(parent, names=[name]).home / name


def wants(name: str, items: Collection[str] | None) -> bool:
    """Whether a file of a checkpoint is one of those wanted.

    Args:
        name: such as `state/params/...`. What lies in no item is always wanted.
        items: of the arrays; None is all.
    """
    if items is None:
        return True

    parts = name.split("/")
    is_in_item = parts[0] == ARRAYS and len(parts) > 2
    return not is_in_item or parts[1] in items


def fetch(checkpoint: Path, items: Collection[str] | None) -> None:
    """Downloads the arrays of a checkpoint in object storage to where a local one has them; see
    `wants`."""
    if not is_stand_in(checkpoint):
        return

    place = Remote((checkpoint / ORIGIN_FILE).read_text()) / ARRAYS
    home = checkpoint / ARRAYS

    wanted = [name for name in place.files() if wants(f"{ARRAYS}/{name}", items)]
    absent = [name for name in wanted if not (home / name).exists()]
    place.download(home, absent)


def forget(checkpoint: Path) -> None:
    """Deletes what `fetch` has downloaded."""
    if is_stand_in(checkpoint):
        shutil.rmtree(checkpoint / ARRAYS, ignore_errors=True)


@contextlib.contextmanager
def arrays(checkpoint: Path, items: Collection[str]) -> Iterator[Path]:
    """The directory with the arrays of a checkpoint. From object storage they are here while this
    is entered."""
    fetch(checkpoint, items)
    try:
        yield (checkpoint / ARRAYS).absolute()
    finally:
        forget(checkpoint)


def is_stand_in(checkpoint: Path) -> bool:
    """Whether the arrays of a checkpoint are in object storage."""
    return (checkpoint / ORIGIN_FILE).is_file()
