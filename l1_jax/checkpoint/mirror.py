"""A run directory in object storage. The run works on a local directory that stands for it; this
keeps the two alike.

What differs there: the best model is `best_model-<step>`, so that a new one is whole before the old
one goes.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from l1_jax.checkpoint.names import (
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

_opened: dict[str, Path] = {}  # URL -> the local directory that stands for it


class Mirror:
    """A local directory, `home`, that stands for the run directory at `url`: checkpoints in it have
    all but arrays."""

    def __init__(self, url: str, names: Collection[str]):
        """Downloads the small files of the checkpoints, and `names`: files, or checkpoints that no
        run named."""
        self.remote = Remote(url)
        self.home = _opened[self.remote.url] = scratch(self.remote.url)
        self._there: set[str] = set()  # what is there of a run, finished or not
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the logs that are there
        bests: dict[int, str] = {}
        self.start = ""  # the start of the run that this process belongs to, as run.json names it
        entries = self.remote.entries()
        for name, size in entries.items():
            if name in names and size is not None:
                self.remote.download(self.home, [name])
            elif name in LOG_DIRECTORIES:
                (self.home / name).mkdir()
            elif name in names or is_run_checkpoint(name):
                place, local = self.remote / name, self.home / name
                small = [
                    file
                    for file, size in place.entries().items()
                    if size or (file == INFO_FILE and size == 0)
                ]
                if INFO_FILE in small:
                    place.download(local, small)
                    (local / ORIGIN_FILE).write_text(place.url)
                    if is_remote_best(name):
                        bests[_step(local)] = name
                elif RUN_FILE not in entries:
                    continue  # not left by a run
            else:
                continue
            self._there.add(name)
        if bests and (newest := bests[max(bests)]) != BEST:
            shutil.copytree(self.home / newest, self.home / BEST, dirs_exist_ok=True)
        self._found = (self.home / RUN_FILE).read_text() if RUN_FILE in self._there else None

    def take(self, start: str) -> None:
        """Makes the storage follow what was done to the local directory at the `start` of a run."""
        self.start = start
        try:
            if self.remote.read_text(RUN_FILE) != self._found:
                raise FileExistsError
            self.remote.write(
                RUN_FILE, (self.home / RUN_FILE).read_bytes(), new=RUN_FILE not in self._there
            )
        except FileExistsError as error:
            what = f"another run has just begun in {self.remote.url}"
            raise UserError(what, "Start a run once, or set another training.output_dir") from error
        self.sync()
        self.send_logs()

    def send_arrays(self, partial: Path, name: str) -> None:
        """Uploads what is here of a checkpoint's arrays, and deletes it."""
        self._check_ours()
        self._place(name, partial).upload(partial, "state/**/*")
        shutil.rmtree(partial / "state")

    def publish(self, partial: Path, name: str) -> None:
        """Uploads the small files of a checkpoint, whose arrays are all there: now it exists."""
        self.send_logs()  # before the marker, so that no checkpoint is ahead of its metrics
        place = self._place(name, partial)
        place.upload(partial, "*")
        (partial / ORIGIN_FILE).write_text(place.url)

    def sync(self) -> None:
        """Makes the storage follow renames, copies and deletions of whole checkpoints and files in
        `home`."""
        now = set()
        for path in (path for path in self.home.iterdir() if not path.name.startswith(".")):
            if not (path / INFO_FILE).is_file():
                now.add(path.name)
            elif path.name == BEST or not is_remote_best(path.name):
                place, origin = self._place(path.name, path), (path / ORIGIN_FILE).read_text()
                if origin != place.url:
                    place.delete()  # what an interrupted copy left
                    Remote(origin).copy(place)
                    write_text(path / ORIGIN_FILE, place.url)
                now.add(place.url.rpartition("/")[2])
        for name in sorted(self._there - now):  # `metrics.jsonl` after the checkpoints
            (self.remote / name).delete()
        self._there = now

    def send_logs(self) -> None:
        """Uploads what changed of all that is not in a checkpoint."""
        self._check_ours()
        for path in self.home.rglob("*"):
            name = path.relative_to(self.home).as_posix()
            top = self.home / name.partition("/")[0]
            if name.startswith(".") or (top / INFO_FILE).is_file() or not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError):  # a file that W&B needs no more
                stamp = path.stat().st_size, path.stat().st_mtime_ns
                if self._sent.get(name) != stamp:
                    self.remote.write(
                        name, path.read_bytes()
                    )  # read at once, for the file may grow
                    self._sent[name] = stamp

    def _check_ours(self) -> None:  # nothing locks a bucket
        if self.start not in (self.remote.read_text(RUN_FILE) or ""):
            what = f"another start of the run has taken over {self.remote.url}"
            raise UserError(
                what, "Let it run, or stop it and run the same command again, with `resume`"
            )

    def _place(self, name: str, checkpoint: Path) -> Remote:
        return self.remote / remote_name(name, _step(checkpoint))


def _step(checkpoint: Path) -> int:
    try:
        return json.loads((checkpoint / INFO_FILE).read_text())["step"]
    except (ValueError, LookupError, TypeError):  # damaged; so is all of it
        number = re.search(r"\d+", checkpoint.name)
        return int(number[0]) if number else 0


def local(url: str) -> Path:
    """The local stand-in for a run directory, or for a checkpoint, that may be there or not."""
    url = url.rstrip("/")
    for known, home in _opened.items():
        if f"{url}/".startswith(f"{known}/") and home.exists():
            return home / url[len(known) + 1 :]
    parent, _, name = url.rpartition("/")
    if not is_run_checkpoint(name.removesuffix(".pt")) and Remote(url).read_text(INFO_FILE) is None:
        return Mirror(url, ()).home
    return Mirror(parent, [name]).home / name


def wants(name: str, items: Collection[str] | None) -> bool:
    """Whether a file of a checkpoint, `state/params/...`, is in one of `items` or in none; None is
    all items."""
    parts = name.split("/")
    return items is None or parts[0] != "state" or len(parts) == 2 or parts[1] in items


def fetch(checkpoint: Path, items: Collection[str] | None) -> None:
    """Downloads the arrays of a checkpoint in object storage to where a local one has them; see
    `wants`."""
    if is_stand_in(checkpoint):
        place, state = (
            Remote((checkpoint / ORIGIN_FILE).read_text()) / "state",
            checkpoint / "state",
        )
        names = [
            name
            for name in place.files()
            if wants(f"state/{name}", items) and not (state / name).exists()
        ]
        place.download(state, names)


def forget(checkpoint: Path) -> None:
    """Deletes what `fetch` has downloaded."""
    if is_stand_in(checkpoint):
        shutil.rmtree(checkpoint / "state", ignore_errors=True)


@contextlib.contextmanager
def arrays(checkpoint: Path, items: Collection[str]) -> Iterator[Path]:
    """The directory with the arrays of a checkpoint. From object storage they are here while this
    is entered."""
    fetch(checkpoint, items)
    try:
        yield (checkpoint / "state").absolute()
    finally:
        forget(checkpoint)


def is_stand_in(checkpoint: Path) -> bool:
    """Whether the arrays of a checkpoint are in object storage."""
    return (checkpoint / ORIGIN_FILE).is_file()
