"""The run directory: whose it is, what is in it, how a start of the run takes it over."""

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from l1_jax.checkpoint.manifest import CheckpointInfo, find_damage, read_info
from l1_jax.checkpoint.mirror import Mirror, forget
from l1_jax.checkpoint.names import (
    ASIDE,
    BEST,
    BUNDLE,
    DAMAGED,
    DELETING,
    INFO_FILE,
    LOCK_FILE,
    LOG_DIRECTORIES,
    METRICS_FILE,
    OLD,
    RUN_FILE,
    RUN_FILES,
    SKIPPED_FILE,
    STEP,
    is_checkpoint,
    set_aside,
    step_directories,
    step_name,
)
from l1_jax.checkpoint.saver import recover
from l1_jax.console import log
from l1_jax.devices.processes import is_main, together
from l1_jax.errors import BusyError, UserError, check_writable
from l1_jax.storage import files
from l1_jax.storage.files import check_inside, read_json, write_text
from l1_jax.storage.lock import check_unlocked, lock
from l1_jax.storage.remote import display_name, is_url

RUN_FILE_BYTES = 1 << 20

# What run.json calls another run's checkpoint: that from which a branch goes on, and that whose
# weights a run began with.
ORIGIN = "origin"
TRANSFER = "transfer"
ORIGINS = (ORIGIN, TRANSFER)

# A network disk may show late what another machine has written.
_LATE_SECONDS = 20.0


class Taken(NamedTuple):
    """What a start of a run finds and says when the directory becomes its own."""

    # What run.json is to say of this start. `run_id` stays the same after a resume; `start` never
    # does, and by it processes know whose the directory is.
    facts: dict[str, Any]

    # What it said of the starts before.
    before: dict[str, Any]


class RunDirectory:
    """Where a run is written, as one start of it meets it.

    Attributes:
        path: the directory; of a run at a URL, the local one that stands for it.
        mirror: what keeps the two alike, of a run at a URL.
        last_alive: when the last start was alive, in seconds since the epoch, if it was killed and
            its lock has been seen.
    """

    def __init__(self, output_dir: str | Path):
        """Writes nothing.

        Args:
            output_dir: a path or a URL, as `training.output_dir` has it.

        Raises:
            UserError: it cannot be written to.
        """
        output = str(output_dir)
        self.mirror = Mirror(output, RUN_FILES) if is_url(output) else None
        self.path = self.mirror.home if self.mirror else Path(output)
        self.last_alive: float | None = None

        # Its run.json when this start decided what to do: another start would change it.
        self._seen: bytes | None = None

        check_writable(self.path, "training.output_dir")

    @property
    def run_file(self) -> Path:
        """Its run.json, which is there once a run has begun in it."""
        return self.path / RUN_FILE

    def check_files(self, *, resume: bool) -> None:
        """Checks the files that a run reads, writes or deletes here.

        Raises:
            UserError: a link leads out of the directory, a directory has the name of a file, or
                `resume` would meet a damaged file.
        """
        patterns = (f"{STEP}-*", f"{ASIDE}-*", ".*-*")
        names = [path.name for pattern in patterns for path in self.path.glob(pattern)]
        check_inside(self.path, *RUN_FILES, *LOG_DIRECTORIES, LOCK_FILE, BEST, *names)

        for name in (*RUN_FILES, LOCK_FILE):
            path = self.path / name
            if path.is_dir():
                what = f"{display_name(path)} is a directory, and a run writes a file there"
                raise UserError(what, "Rename it")

        if resume:
            _check_run_file(self.run_file)
            _check_rows(self.path / METRICS_FILE)
            _check_rows(self.path / SKIPPED_FILE)

    def check_free(self, *, overwrite: bool = False) -> None:
        """Checks that nothing here is overwritten unasked.

        Args:
            overwrite: a run may be replaced; what no run wrote may not.

        Raises:
            UserError: something is in the way.
        """
        best = self.path / BEST
        is_run = self.run_file.is_file()
        is_taken = any((self.path / name).exists() for name in (*RUN_FILES, BEST))
        is_taken |= bool(step_directories(self.path))

        if not is_taken:
            return

        if is_run and not overwrite:
            remedy = "Go on with it by `resume`, replace it by `overwrite`"
            remedy += ", or set another training.output_dir"
            raise UserError(f"{display_name(self.path)} holds a run already", remedy)

        is_strange = best.exists() and not is_checkpoint(best)
        if not is_run or is_strange:
            what = f"{display_name(self.path)} holds files with names that a run uses"
            raise UserError(f"{what}, and which no run wrote", "Set another training.output_dir")

    def look(self) -> None:
        """Remembers whose the directory is, so that `lock` can tell whether another start came in
        between.

        Raises:
            BusyError: a run is under way in it.
        """
        check_unlocked(self.path / LOCK_FILE, *self._busy())
        self._seen = self._stamp()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the directory, and keeps other runs out of it. Nothing locks a bucket: of one, only
        the local directory is made.

        Raises:
            BusyError: another run is in it, or was since `look`.
        """
        self.path.mkdir(parents=True, exist_ok=True)

        if self.mirror:
            yield
            return

        with lock(self.path / LOCK_FILE, *self._busy()) as last_alive:
            self.last_alive = last_alive or self.last_alive

            if self._stamp() != self._seen:
                what = f"another run was in {display_name(self.path)} while this one started"
                raise BusyError(what, "Run the same command again")

            yield

    def recover(self) -> None:
        """Gives checkpoints their names back that a kill left without, so that the newest is found.
        Every process has to call this."""
        with together():
            if is_main() and not self.mirror and any(self.path.glob(f"{OLD}-*")):
                with self.lock():
                    recover(self.path)

    def clear(self) -> None:
        """Deletes what a run wrote, and nothing else."""
        if not self.run_file.is_file():
            return

        # Else an old best model would get its name back afterwards.
        recover(self.path)

        found = [self.path / name for name in LOG_DIRECTORIES]
        for pattern in (BEST, f"{STEP}-*", f"{ASIDE}-*", f"{BUNDLE}-*"):
            found += [info.parent for info in self.path.glob(f"{pattern}/{INFO_FILE}")]

        for path in found:
            if path.is_dir() and not path.is_symlink():
                # No half of one is seen under its name.
                files.delete(set_aside(path, DELETING))

        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)

    def take(
        self,
        info: CheckpointInfo,
        facts: dict[str, Any],
        damaged: Collection[Path] = (),
        *,
        is_best_void: bool = False,
    ) -> Taken:
        """Makes the directory read as if the run had just reached the step of `info`.

        Args:
            info: of the step that the run goes on from.
            facts: what run.json is to say of this start, beside two ids.
            damaged: checkpoints that were found to be so: they are renamed.
            is_best_void: the best model was the best by another measure: it is renamed.
        """
        recover(self.path)
        before = json.loads(self.run_file.read_text()) if self.run_file.exists() else {}

        for bad in damaged:
            log.warning("%s renamed to %s", bad.name, set_aside(bad, DAMAGED).name)

        rewind(self.path, info, is_best_void=is_best_void)

        run_id = before.get("run_id", uuid.uuid4().hex[:8])
        ids = {"run_id": run_id, "start": uuid.uuid4().hex}
        return Taken(ids | facts, before)

    def join(self, start: str) -> None:
        """Makes this process one of a start that has taken the directory. Without object storage
        that is to be the same directory, and not one of that name on another machine.

        Args:
            start: the id of the start, from `take` in the main process.

        Raises:
            UserError: this process does not see it.
        """
        if self.mirror:
            self.mirror.start = start
            return

        end = time.monotonic() + _LATE_SECONDS
        while not (self.run_file.is_file() and start in self.run_file.read_text()):
            if time.monotonic() > end:
                what = f"training.output_dir {self.path} of this process is not that of process 0"
                remedy = (
                    "Set it to a directory on a disk that all share, or to a gs:// or s3:// URL"
                )
                raise UserError(what, remedy)

            time.sleep(0.1)

    def _stamp(self) -> bytes | None:
        return self.run_file.read_bytes() if self.run_file.exists() else None

    def _busy(self) -> tuple[str, str]:
        remedy = "Wait until it has ended, or stop it; or set another training.output_dir"
        return f"{display_name(self.path)} is being written", remedy


def _check_run_file(path: Path) -> None:
    """Raises UserError where run.json is there and no run wrote it so."""
    if not path.exists():
        return

    try:
        content = read_json(path, RUN_FILE_BYTES)

        if not isinstance(content.get("run_id"), str):
            raise UserError(f"{display_name(path)} is damaged (no run_id)", "")

        for name in ORIGINS:
            if not _is_origin(content.get(name)):
                raise UserError(f"{display_name(path)} is damaged ({name})", "")
    except UserError as error:
        remedy = "Restore it from a copy, or delete it"
        remedy += ": the account of the run's time then begins anew"
        raise UserError(error.what, remedy) from None


def _is_origin(entry: object) -> bool:
    """Whether run.json may hold this under one of `ORIGINS`; None is that of a run without."""
    if entry is None:
        return True

    if not isinstance(entry, dict):
        return False

    kinds = {name: type(value) for name, value in entry.items()}
    return kinds == {"path": str, "step": int, "sha256": str}


def _check_rows(path: Path) -> None:
    """Raises UserError where a whole line of a log of rows is no row."""
    if not path.exists():
        return

    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            # A kill cuts the last one.
            is_whole = line.endswith(b"\n")
            if is_whole and not _is_row(line):
                raise UserError(f"{display_name(path)}:{number} is damaged", "Delete the line")


def _is_row(line: bytes) -> bool:
    try:
        return type(json.loads(line)["step"]) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def find_saved(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and path of a run's checkpoints and of its best model, good or damaged."""
    found = [*step_directories(run_dir).items()]
    best = run_dir / BEST

    if is_checkpoint(best):
        is_readable = not find_damage(best, items=())
        # Where its step is not known, it is to be the first that is looked at.
        found.append((read_info(best).step if is_readable else sys.maxsize, best))
        forget(best)

    return found


def rewind(run_dir: Path, info: CheckpointInfo, *, is_best_void: bool = False) -> None:
    """Puts checkpoints after the step of `info` aside, and the best model where it is void, and
    drops later rows, and those that it will write again."""
    for step, path in find_saved(run_dir):
        if step > info.step:
            aside = set_aside(path, ASIDE)
            log.info("%s is past step %d: renamed to %s", path.name, info.step, aside.name)
        elif is_best_void and path.name == BEST:
            # It may be all that there is of the step from which the run goes on.
            last = run_dir / step_name(info.step)
            is_needed = step == info.step and not os.path.lexists(last)
            aside = path.rename(last) if is_needed else set_aside(path, ASIDE)
            log.info("%s was the best by another measure: renamed to %s", path.name, aside.name)

    for log_file in (run_dir / METRICS_FILE, run_dir / SKIPPED_FILE):
        if not log_file.exists():
            continue

        # A kill cuts the last one.
        lines = log_file.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if _is_past(json.loads(line), info)]
        write_text(log_file, "".join(kept))


def _is_past(row: dict[str, Any], info: CheckpointInfo) -> bool:
    """Whether a row was written up to the step of `info`, and will not be written again."""
    is_due = info.evaluation_due and row["step"] == info.step and "val/loss" in row
    return row["step"] <= info.step and not is_due
