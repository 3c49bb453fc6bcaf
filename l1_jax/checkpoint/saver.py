"""Checkpoints of a run: written in the background, kept or deleted, agreed on by all processes."""

import contextlib
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
import orbax.checkpoint as ocp

from l1_jax.checkpoint.manifest import CheckpointInfo, hash_files, info_text, list_files, read_info
from l1_jax.checkpoint.mirror import Mirror
from l1_jax.checkpoint.names import (
    ARRAYS,
    BUNDLE,
    DELETING,
    INFO_FILE,
    interrupted,
    is_checkpoint,
    replaced,
    saving_name,
    set_aside,
    step_directories,
)
from l1_jax.checkpoint.write import (
    Trees,
    copy_to_hold,
    count_bytes,
    delete_quietly,
    flush,
    give_names,
    open_checkpointer,
    save_arguments,
    write_manifest,
    write_texts,
)
from l1_jax.console import DISK_FAULTS, log
from l1_jax.devices.processes import exchange, is_main
from l1_jax.errors import RunError, UserError
from l1_jax.storage import files
from l1_jax.storage.remote import display_name

# For another process of the job: uploads may take long, and if one dies, jax ends the others.
_PATIENCE_SECONDS = 3600

# That Orbax 0.12 has in a save in the background: after the arrays, and after its own renaming.
_BARRIERS = 2

_FAULTS = (*DISK_FAULTS, errno.EACCES, errno.EPERM)  # TensorStore has the words in its own errors


class Saver:
    """Writes checkpoints in the background, one at a time.

    A save is written under a hidden name and renamed when whole, so a name that matches
    `checkpoint-*` is complete. With a `mirror`, each process has a `run_dir` of its own, and
    uploads what it wrote there. A save that fails, in one process or in all, fails in all.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        texts: Mapping[str, str],
        mirror: Mirror | None = None,
        warn: bool = False,
        keep_every: int | None = None,
    ):
        """
        Args:
            run_dir: where the checkpoints are.
            keep: how many of the newest stay.
            texts: the small files that each carries, by name.
            mirror: of a run in object storage.
            warn: a save that fails is warned of, and the run goes on; else it ends with a RunError.
            keep_every: the newest whose step is a multiple of it stays in any case.
        """
        self.run_dir = run_dir
        self.keep = keep
        self.keep_every = keep_every
        self.texts = texts
        self.mirror = mirror
        self.warn = warn

        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._checkpointer: Any = None
        self._items: tuple[str, ...] = ()  # that the checkpointer was opened for

        # Of the newest save: its number, what it is, and why it is not there.
        self._number = 0
        self._info = CheckpointInfo(0, 0, "", "", "")
        self._bytes = 0
        self._passed_barriers = 0
        self._lost: RunError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            log.error("%s", error)  # beside what ends the run

    def save(
        self,
        trees: Trees,
        info: CheckpointInfo,
        names: list[str],
        more_texts: Mapping[str, str] | None = None,
    ) -> None:
        """Copies the trees to the host and returns; then they are written in the background.

        Args:
            trees: arrays by item. All processes have to call this.
            info: what the checkpoint says of itself.
            names: under each of which it is published, the last one first.
            more_texts: that this checkpoint carries beside those of all.
        """
        self.wait()
        partial = self.run_dir / saving_name(info.step)

        self._number += 1
        self._info = info
        self._bytes = count_bytes(trees, is_private=self.mirror is not None)
        self._passed_barriers = 0
        self._lost = None

        try:
            # The main process knows: without a common disk it alone has given checkpoints names.
            begin = functools.partial(self._begin, partial, names, more_texts or {})
            names = json.loads(self._agreed("begins", begin)[0])
        except Exception as error:
            self._clear(partial)
            self._fail(error)
            return

        if not names:
            self._clear(partial)
            return

        write = self._writer(partial, trees)
        self._pending = self._pool.submit(self._publish, partial, names, write)

    def wait(self) -> bool:
        """Returns when nothing is being written: whether the newest save is good. Raises what made
        it fail, unless that is only to be warned of."""
        pending = self._pending
        self._pending = None

        try:
            if pending:
                pending.result()
        except Exception as error:
            self._fail(error)

        return self._lost is None

    def close(self) -> None:
        """Waits for the save under way. The last one must not have failed."""
        self.warn = False
        self.wait()

        if self._lost:
            raise self._lost

        if self.mirror and is_main():
            self._pending = self._pool.submit(self.mirror.send_logs)
            self.wait()

        if self._checkpointer:
            self._checkpointer.close()

        self._pool.shutdown()

    def _writer(self, partial: Path, trees: Trees) -> Callable[[], None]:
        """What writes the arrays, to be called in the background; or has begun to, here."""
        self._open(trees)
        own = copy_to_hold(trees)
        path = (partial / ARRAYS).absolute()
        write = functools.partial(self._checkpointer.save, path, args=save_arguments(own))

        if own is not trees and jax.process_count() == 1:
            return write

        # Orbax reads the arrays now, or talks to the other processes.
        try:
            write()
        except Exception as error:  # the other processes are waiting in the background
            return functools.partial(_raise, error)

        return _nothing

    def _begin(self, partial: Path, names: list[str], more_texts: Mapping[str, str]) -> str:
        """Makes the directory of a save; returns the names that are still to be given, as JSON."""
        if self.mirror and is_main():
            # It would be written over object by object, and an interrupted one would be none. The
            # state is the same.
            names = [name for name in names if not self._is_there(name)]

            for bundle in (name for name in names if name.startswith(BUNDLE)):
                (self.mirror.remote / bundle).delete()

        # Orbax lets no process write before this one is with it.
        if names and (is_main() or self.mirror):
            if shutil.disk_usage(self.run_dir).free < self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            write_texts(partial, {**self.texts, INFO_FILE: info_text(self._info), **more_texts})

        return json.dumps(names)

    def _is_there(self, name: str) -> bool:
        path = self.run_dir / name

        if not is_checkpoint(path) or name.startswith(BUNDLE):
            return False

        return read_info(path).step == self._info.step

    def _publish(self, partial: Path, names: list[str], write: Callable[[], None]) -> None:
        """Writes, hashes, sends and names a save, each part when all processes have done the one
        before."""
        try:
            texts = self._agreed("is written", lambda: self._written(partial, write))
            hashes = [json.loads(text) for text in texts]

            # With a mirror several processes have written the same small file: that of the first
            # of them is taken.
            owner = {name: i for i in reversed(range(len(hashes))) for name in hashes[i]}
            digests = {name: hashes[i][name] for name, i in owner.items()}

            if self.mirror:
                others = [
                    name
                    for name, i in owner.items()
                    if name.startswith(f"{ARRAYS}/") and i != jax.process_index()
                ]
                self._agreed("is sent", lambda: self._send(partial, names[-1], others))

            self._agreed("is published", lambda: self._name(partial, names, digests))
        finally:
            self._clear(partial)

    def _open(self, items: Sequence[str] | Trees) -> None:
        """Opens the checkpointer, where it is not open for these items already."""
        names = tuple(items)

        if self._checkpointer and self._items == names:
            return

        if self._checkpointer:
            self._checkpointer.close()

        self._items = names
        self._checkpointer = open_checkpointer(
            ocp.AsyncCheckpointer,
            items=names,
            is_private=self.mirror is not None,
            barrier=self._pass_barrier,
        )

    def _pass_barrier(self, *_: object, **__: object) -> None:
        """Orbax's barrier. Its own one would wait for twenty minutes for a process that could not
        write."""
        number = self._passed_barriers
        self._passed_barriers += 1

        try:
            self._agreed(f"passes barrier {number}", lambda: "")
        except RunError:
            self._passed_barriers = _BARRIERS
            raise

    def _written(self, partial: Path, write: Callable[[], None]) -> str:
        """Has Orbax write, and waits. Returns the hashes of what this process answers for: all it
        wrote, or its share of what all wrote to one disk."""
        try:
            write()
            self._checkpointer.wait_until_finished()
        except Exception as error:
            if self._passed_barriers < _BARRIERS:  # the others wait there
                stage = f"passes barrier {self._passed_barriers}"
                self._agreed(stage, functools.partial(_raise, error))
            raise

        if self.mirror:
            return json.dumps(hash_files(partial, list_files(partial)))

        if not is_main():
            flush(partial)

        share = list_files(partial)[jax.process_index() :: jax.process_count()]
        return json.dumps(hash_files(partial, share))

    def _send(self, partial: Path, name: str, others: list[str]) -> str:
        assert self.mirror

        for other in others:
            (partial / other).unlink(missing_ok=True)

        self.mirror.send_arrays(partial, name)
        return ""

    def _name(self, partial: Path, names: list[str], digests: dict[str, Any]) -> str:
        """Gives a save its manifest and its names; from then on it is a checkpoint."""
        if not is_main():
            return ""

        # A network disk may have hidden a file from the process in whose share it was.
        unseen = []
        if not self.mirror:
            unseen = [name for name in list_files(partial) if name not in digests]

        write_manifest(partial, digests | hash_files(partial, unseen))

        if self.mirror:
            self.mirror.publish(partial, names[-1])
        else:
            flush(partial)

        give_names(partial, [self.run_dir / name for name in names])
        self._delete_old()

        if self.mirror:
            self.mirror.sync()

        return ""

    def _delete_old(self) -> None:
        checkpoints = step_directories(self.run_dir)
        bundles = step_directories(self.run_dir, BUNDLE)
        spared: list[Path] = []

        if self.keep_every:
            every = self.keep_every
            spared = [path for step, path in checkpoints.items() if step % every == 0][-1:]

        old = [path for found in (checkpoints, bundles) for path in [*found.values()][: -self.keep]]

        with contextlib.suppress(OSError):  # the next save deletes it
            for path in old:
                if path not in spared:
                    # No half of one is seen under its name.
                    set_aside(path, DELETING)

            for left in self.run_dir.glob(f"{DELETING}-*"):
                files.delete(left)

    def _agreed(self, stage: str, action: Callable[[], str]) -> list[str]:
        """Runs a part of a save, and returns what it gave in each process; raises in all where it
        failed in one."""
        fault: Exception | None = None

        try:
            mine = {"text": action()}
        except Exception as error:
            fault = error
            mine = {"fault": _reason(error) or type(error).__name__}

        key = f"save {self._number} {stage}"
        answers = exchange(key, json.dumps(mine), _PATIENCE_SECONDS)

        if fault:
            raise fault

        for number, answer in enumerate(map(json.loads, answers)):
            if "fault" in answer:
                what = f"step {self._info.step} could not be saved by process {number}"
                remedy = "See what that process says, and run the same command with `resume`"
                raise RunError(f"{what} ({answer['fault']})", remedy)

        return [json.loads(answer)["text"] for answer in answers]

    def _clear(self, partial: Path) -> None:
        """Deletes what is left of a save: nothing, of a good one on a common disk."""
        if is_main() or self.mirror:
            for left in (partial, *self.run_dir.glob(f"{partial.name}-*")):
                delete_quietly(left)

    def _fail(self, error: Exception) -> None:
        """Ends the run with what made a save fail, or says it and makes ready for the next."""
        reason = _reason(error)

        if not reason:
            raise error

        if isinstance(error, UserError):  # of the mirror, which names the URL, or another process
            what = reason
            remedy = error.remedy
        else:
            where = f"step {self._info.step} could not be saved in {display_name(self.run_dir)}"
            what = f"{where} ({reason}): {self._room()}"
            remedy = "See that the disk has room and can be written"
            remedy += ", and run the same command with `resume`"

        # It has failed: what it says now is the same once more.
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = None

        if not self.warn:
            raise RunError(what, remedy) from error

        log.warning("%s; training goes on (training.on_save_error: warn)", what)
        self._lost = RunError(what, remedy)

    def _room(self) -> str:
        """What the newest save needs, and what there is."""
        need = f"it needs at least {self._bytes / 1e6:,.1f} MB"

        with contextlib.suppress(OSError):  # of a disk that is gone
            free = shutil.disk_usage(self.run_dir).free / 1e6
            need += f", and {free:,.1f} MB are free now that what was written of it is deleted"

        return need


def recover(run_dir: Path) -> None:
    """Clears what an interrupted save, replacement or deletion left behind."""
    for path in replaced(run_dir):
        files.recover(path)

    for left in interrupted(run_dir):
        files.delete(left)


def _raise(error: Exception) -> NoReturn:
    raise error


def _nothing() -> None:
    pass


def _reason(error: Exception) -> str | None:
    """In words what the disk, the storage or another process did to a save; None is a mistake of
    ours."""
    if isinstance(error, UserError):
        return error.what

    if isinstance(error, OSError):  # also Orbax's TimeoutError: a process that did not come
        return error.strerror or str(error) or type(error).__name__

    text = str(error)

    for number in _FAULTS:
        if os.strerror(number) in text:
            return os.strerror(number)

    return "another process did not come in time" if "DEADLINE_EXCEEDED" in text else None
