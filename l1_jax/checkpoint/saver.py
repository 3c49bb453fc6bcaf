"""How a checkpoint comes to be: written in the background by Orbax, hashed, published by rename when whole."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from l1_jax.checkpoint.manifest import hash_files, list_files, manifest_text
from l1_jax.checkpoint.mirror import Mirror
from l1_jax.checkpoint.names import BEST, BUNDLE, INFO_FILE, MANIFEST_FILE, is_checkpoint, set_aside, step_directories
from l1_jax.checkpoint.restore import CheckpointInfo, items_of, open_checkpointer, read_info
from l1_jax.console import DISK_FAULTS, log
from l1_jax.devices.processes import exchange, is_main
from l1_jax.errors import RunError, UserError
from l1_jax.storage import files
from l1_jax.storage.remote import display_name
from l1_jax.training.state import TrainState

_PATIENCE_SECONDS = 3600  # for another process of the job: uploads may take long, and if one dies, jax ends the others
_BARRIERS = 2  # that Orbax 0.12 has in a save in the background: after the arrays, and after its own renaming
_FAULTS = (*DISK_FAULTS, errno.EACCES, errno.EPERM)  # TensorStore has the words in its own errors


class Saver:
    """Writes checkpoints in the background, one at a time.

    A save is written under a hidden name and renamed when whole, so a name that matches `checkpoint-*` is complete.
    Of these the newest `keep` stay. Each checkpoint carries the small files `texts`, by name. With a `mirror`, each
    process has a `run_dir` of its own, and uploads what it wrote there. A save that fails, in one process or in all,
    fails in all: with `warn` they go on, and else end with a RunError. The newest whose step is a multiple of
    `keep_every` stays in any case.
    """

    def __init__(
        self,
        run_dir: Path,
        keep: int,
        texts: dict[str, str],
        mirror: Mirror | None = None,
        warn: bool = False,
        keep_every: int | None = None,
    ):
        self.run_dir, self.keep, self.texts, self.mirror, self.warn = run_dir, keep, texts, mirror, warn
        self.keep_every = keep_every
        self._checkpointer = self._open()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._number, self._info, self._bytes = 0, CheckpointInfo(0, 0, "", "", ""), 0  # of the newest save
        self._lost: RunError | None = None  # why it is not there

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
        self, state: TrainState, info: CheckpointInfo, names: list[str], more: Mapping[str, str] | None = None
    ) -> None:
        """Copies the state to the host and returns; then it is written, and published under each of `names`, the last
        one first. It carries the texts `more` beside those of all checkpoints."""
        self.wait()
        partial = self.run_dir / f".saving-{info.step}"
        self._number, self._info, self._bytes, self._lost = self._number + 1, info, self._size(state), None
        self._passed = 0  # barriers of Orbax
        try:
            # The main process knows: without a common disk it alone has given checkpoints their names.
            names = json.loads(self._agreed("begins", lambda: self._begin(partial, names, more or {}))[0])
        except Exception as error:
            self._clear(partial)
            self._fail(error)
            return
        if not names:
            self._clear(partial)
            return
        own = _own(state)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in items_of(own).items()}
        path, args = (partial / "state").absolute(), ocp.args.Composite(**items)
        write: Callable[[], None] = functools.partial(self._checkpointer.save, path, args=args)
        if own is state or jax.process_count() > 1:  # Orbax reads the state now, or talks to the other processes
            try:
                write()
                write = lambda: None  # noqa: E731
            except Exception as error:
                write = functools.partial(_raise, error)  # to the other processes, which are waiting in the background
        self._pending = self._pool.submit(self._publish, partial, names, write)

    def wait(self) -> bool:
        """Returns when nothing is being written: whether the newest save is good. Raises what made it fail, unless
        that is only to be warned of."""
        pending, self._pending = self._pending, None
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
        self._checkpointer.close()
        self._pool.shutdown()

    def _begin(self, partial: Path, names: list[str], more: Mapping[str, str]) -> str:
        if self.mirror and is_main():
            # It would be written over object by object, and an interrupted one would be none. The state is the same.
            names = [name for name in names if not self._is_there(name)]
            for bundle in (name for name in names if name.startswith(BUNDLE)):
                (self.mirror.remote / bundle).delete()
        if names and (is_main() or self.mirror):  # Orbax lets no process write before this one is with it
            if shutil.disk_usage(self.run_dir).free < self._bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial.mkdir(parents=True)
            info = json.dumps(dataclasses.asdict(self._info), indent=1)
            for name, text in (self.texts | {INFO_FILE: info} | dict(more)).items():
                (partial / name).write_text(text, encoding="utf-8")
        return json.dumps(names)

    def _is_there(self, name: str) -> bool:
        path = self.run_dir / name
        if not is_checkpoint(path) or name.startswith(BUNDLE):
            return False
        return read_info(path).step == self._info.step

    def _publish(self, partial: Path, names: list[str], write: Callable[[], None]) -> None:
        try:
            hashes = [json.loads(text) for text in self._agreed("is written", lambda: self._written(partial, write))]
            # With a mirror several processes have written the same small file: that of the first of them is taken.
            owner = {name: number for number in reversed(range(len(hashes))) for name in hashes[number]}
            digests = {name: hashes[number][name] for name, number in owner.items()}
            if self.mirror:
                others = [name for name in owner if name.startswith("state/") and owner[name] != jax.process_index()]
                self._agreed("is sent", lambda: self._send(partial, names[-1], others))
            self._agreed("is published", lambda: self._name(partial, names, digests))
        finally:
            self._clear(partial)

    def _open(self) -> Any:
        return open_checkpointer(ocp.AsyncCheckpointer, self.mirror is not None, self._pass)

    def _pass(self, *_: object, **__: object) -> None:
        """Orbax's barrier. Its own one would wait for twenty minutes for a process that could not write."""
        number, self._passed = self._passed, self._passed + 1
        try:
            self._agreed(f"passes barrier {number}", lambda: "")
        except RunError:
            self._passed = _BARRIERS
            raise

    def _written(self, partial: Path, write: Callable[[], None]) -> str:
        """Has Orbax write, and waits. What this process answers for: all it wrote, or its share of what all wrote
        to one disk."""
        try:
            write()
            self._checkpointer.wait_until_finished()
        except Exception as error:
            if self._passed < _BARRIERS:  # the others wait there
                self._agreed(f"passes barrier {self._passed}", functools.partial(_raise, error))
            raise
        if self.mirror:
            return json.dumps(hash_files(partial, list_files(partial)))
        if not is_main():
            _flush(partial)
        return json.dumps(hash_files(partial, list_files(partial)[jax.process_index() :: jax.process_count()]))

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
        unseen = [] if self.mirror else [name for name in list_files(partial) if name not in digests]
        (partial / MANIFEST_FILE).write_text(manifest_text(digests | hash_files(partial, unseen)), encoding="utf-8")
        if self.mirror:
            self.mirror.publish(partial, names[-1])
        else:
            _flush(partial)
        for name in names:
            if os.path.lexists(stray := self.run_dir / name) and not is_checkpoint(stray):
                log.warning("%s is in the way of a checkpoint: renamed to %s", name, set_aside(stray, "damaged").name)
        for name in names[1:]:
            twin = partial.with_name(f"{partial.name}-{name}")
            shutil.copytree(partial, twin, copy_function=_link)
            files.replace(twin, self.run_dir / name)
        files.replace(partial, self.run_dir / names[0])
        self._delete_old()
        if self.mirror:
            self.mirror.sync()
        return ""

    def _delete_old(self) -> None:
        checkpoints = step_directories(self.run_dir)
        spared = [path for step, path in checkpoints.items() if self.keep_every and step % self.keep_every == 0][-1:]
        bundles = step_directories(self.run_dir, BUNDLE)
        old = [path for found in (checkpoints, bundles) for path in list(found.values())[: -self.keep]]
        with contextlib.suppress(OSError):  # the next save deletes it
            for path in old:
                if path not in spared:
                    path.rename(path.with_name(f".deleting-{path.name}"))  # no half of one is seen under its name
            for left in self.run_dir.glob(".deleting-*"):
                files.delete(left)

    def _agreed(self, stage: str, action: Callable[[], str]) -> list[str]:
        """Runs a part of a save, and returns what it gave in each process; raises in all where it failed in one."""
        fault: Exception | None = None
        try:
            mine = {"text": action()}
        except Exception as error:
            fault, mine = error, {"fault": _reason(error) or type(error).__name__}
        said = exchange(f"save {self._number} {stage}", json.dumps(mine), _PATIENCE_SECONDS)
        if fault:
            raise fault
        for number, answer in enumerate(map(json.loads, said)):
            if "fault" in answer:
                what = f"step {self._info.step} could not be saved by process {number} ({answer['fault']})"
                raise RunError(what, "See what that process says, and run the same command with --resume")
        return [json.loads(text)["text"] for text in said]

    def _clear(self, partial: Path) -> None:
        """Deletes what is left of a save: nothing, of a good one on a common disk."""
        if is_main() or self.mirror:
            with contextlib.suppress(OSError):
                for left in (partial, *self.run_dir.glob(f"{partial.name}-*")):
                    shutil.rmtree(left, ignore_errors=True)

    def _fail(self, error: Exception) -> None:
        """Ends the run with what made a save fail, or says it and makes ready for the next."""
        if not (reason := _reason(error)):
            raise error
        what, remedy = reason, "See that the disk has room and can be written, and run the same command with --resume"
        if isinstance(error, UserError):  # of the mirror, which names the URL, or of another process
            remedy = error.remedy
        else:
            need = f"it needs at least {self._bytes / 1e6:,.1f} MB"
            with contextlib.suppress(OSError):  # of a disk that is gone
                free = shutil.disk_usage(self.run_dir).free / 1e6
                need += f", and {free:,.1f} MB are free now that what was written of it is deleted"
            what = f"step {self._info.step} could not be saved in {display_name(self.run_dir)} ({reason}): {need}"
        with contextlib.suppress(Exception):  # it has failed: what it says now is the same once more
            self._checkpointer.close()
        self._checkpointer = self._open()
        if not self.warn:
            raise RunError(what, remedy) from error
        log.warning("%s; training goes on (training.on_save_error: warn)", what)
        self._lost = RunError(what, remedy)

    def _size(self, state: TrainState) -> int:
        """Bytes that this process's directory is to take."""
        leaves = jax.tree.leaves(items_of(state))
        if not self.mirror:
            return sum(leaf.nbytes for leaf in leaves)
        shards = (shard for leaf in leaves for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)


def _copy(state: TrainState) -> TrainState:
    return jax.tree.map(jnp.copy, state)


def _own(state: TrainState) -> TrainState:
    """What Orbax may hold for as long as it writes: on CPU a copy. It makes none where the arrays lie in the host's
    memory, and the next step, which is to reuse that, would wait for the last byte on disk (benchmarks/RESULTS.md)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    if state.step.addressable_shards[0].device.platform != "cpu":
        return state
    try:
        return jax.block_until_ready(jax.jit(_copy, out_shardings=shardings)(state))
    except jax.errors.JaxRuntimeError as error:
        log.warning(
            "no memory for a copy of the state (%s): the next step waits for the save", str(error).split(":")[0]
        )
        return state


def _raise(error: Exception) -> NoReturn:
    raise error


def recover(run_dir: Path) -> None:
    """Clears what an interrupted save, replacement or deletion left behind."""
    for pattern in (f".old-{BEST}", ".old-checkpoint-[0-9]*", ".old-nonfinite-[0-9]*"):
        for old in run_dir.glob(pattern):
            files.recover(run_dir / old.name.removeprefix(".old-"))
    for pattern in (".saving-[0-9]*", ".deleting-checkpoint-[0-9]*", f".deleting-{BUNDLE}-[0-9]*"):
        for left in run_dir.glob(pattern):
            files.delete(left)


def _flush(directory: Path) -> None:
    """Puts every file on disk, so that a rename never gets there before its content."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # the same file under two names takes no space
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _reason(error: Exception) -> str | None:
    """In words what the disk, the storage or another process did to a save; None is a mistake of ours."""
    if isinstance(error, UserError):
        return error.what
    if isinstance(error, OSError):  # also Orbax's TimeoutError: a process that did not come
        return error.strerror or str(error) or type(error).__name__
    found = (os.strerror(number) for number in _FAULTS if os.strerror(number) in str(error))
    return next(found, "another process did not come in time" if "DEADLINE_EXCEEDED" in str(error) else None)
