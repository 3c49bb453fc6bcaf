"""One writer at a time: a lock on a file that dies with its process."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.console import log
from l1_jax.errors import BusyError, UserError
from l1_jax.storage.files import naming

# How often a holder touches the file.
BEAT_SECONDS = 10.0
# A network disk gives the lock of a dead machine back late: NFS 4 after 90 seconds.
OTHER_HOST_SECONDS = 120.0

_POLL_SECONDS = 0.2
# Of two that found a file free, the last one to write has it; by then both have written.
_SETTLE_SECONDS = 1.0

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

# What a holder writes of itself into the file: host, pid, started, time.
Holder = dict[str, Any]


@contextlib.contextmanager
def lock(path: Path, what: str, remedy: str) -> Iterator[float | None]:
    """Holds a file for this process alone, and deletes it at the end.

    Args:
        path: of the file; its directory exists.
        what: of the error. The message adds who holds it.
        remedy: of the error.

    Yields:
        When the last holder was alive, in seconds since the epoch, if it was killed; else None.

    Raises:
        BusyError: another process has it. At once if that runs on this host, after two minutes on
            another.
    """
    last_alive = path.stat().st_mtime if path.exists() else None
    handle, by_kernel = _acquire(path, what, remedy)

    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "time": time.ctime(),
    }
    with naming(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(mine).encode(), 0)

    if not by_kernel:
        log.warning("%s: this file system has no locks, so its content alone says who writes", path)
        time.sleep(_SETTLE_SECONDS)

        holder = _read_holder(path)
        if holder != mine:
            os.close(handle)
            raise _refusal(holder, what, remedy)

    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(handle, ended), name="lock", daemon=True)
    beat.start()
    try:
        yield last_alive
    finally:
        ended.set()
        beat.join()
        if _is_at(handle, path):
            path.unlink()
        os.close(handle)


def check_unlocked(path: Path, what: str, remedy: str) -> None:
    """Raises the BusyError of `lock` where that would, and writes nothing."""
    if path.exists():
        # A shared lock, for many may ask at once.
        handle, _ = _acquire(path, what, remedy, fcntl.LOCK_SH)
        os.close(handle)


def _acquire(path: Path, what: str, remedy: str, kind: int = fcntl.LOCK_EX) -> tuple[int, bool]:
    """Opens a file that nobody else holds; the handle, and whether the kernel says so.

    BusyError where somebody holds it.
    """
    here = socket.gethostname()
    end = time.monotonic() + OTHER_HOST_SECONDS
    first_beat = None

    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)

            if not _is_at(handle, path):
                # Its holder ended just now, and deleted it.
                os.close(handle)
                continue

            # The locks of this disk may end at each host: the kernel knows nothing of another's.
            holder = _read_holder(path)
            if holder.get("host", here) != here and _beats(handle):
                os.close(handle)
                raise _refusal(holder, what, remedy)

            return handle, True
        except OSError as error:
            has_no_locks = error.errno in _NO_LOCKS
            is_held = error.errno in _HELD

            holder = _read_holder(path)
            beat = os.fstat(handle).st_mtime_ns
            first_beat = first_beat or beat

            is_over = time.monotonic() > end
            is_here = holder.get("host") == here
            is_alive = is_here and _started(holder["pid"]) == holder["started"]

            # Without locks only a beat says that a holder elsewhere lives.
            if has_no_locks:
                is_alive |= beat != first_beat
                if not is_alive and (not holder or is_here or is_over):
                    return handle, False
                is_over = False

            os.close(handle)
            if not (is_held or has_no_locks):
                raise

        if is_alive or is_over:
            raise _refusal(holder, what, remedy)
        time.sleep(_POLL_SECONDS)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        what = f"{path} is a link, and is to be a file of its own"
        raise UserError(what, "Delete it") from None


def _refusal(holder: Holder, what: str, remedy: str) -> BusyError:
    if holder:
        who = f"process {holder['pid']} on {holder['host']}, since {holder['time']}"
    else:
        who = "another process"
    return BusyError(f"{what} by {who}", remedy)


def _read_holder(path: Path) -> Holder:
    """Who wrote itself into the file; {} where nobody did, or where the writing is under way."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: another one may get its number later.

    None where there is none.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None

    # The name of the program, in brackets, may hold anything. After it come the state (Z: it has
    # ended, and its parent has not looked yet) and, nineteen fields on, the start.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one that has this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _beats(handle: int) -> bool:
    """Whether a holder that was alive within the last minute still is."""
    end = time.monotonic() + 2.5 * BEAT_SECONDS
    last_beat = os.fstat(handle).st_mtime
    if time.time() - last_beat > 6 * BEAT_SECONDS:
        return False

    while time.monotonic() < end:
        if os.fstat(handle).st_mtime != last_beat:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        # A disk may be away for a while.
        with contextlib.suppress(OSError):
            os.utime(handle)
