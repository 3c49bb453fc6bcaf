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

BEAT_SECONDS = 10.0  # how often a holder touches the file
OTHER_HOST_SECONDS = (
    120.0  # a network disk gives the lock of a dead machine back late: NFS 4 after 90 seconds
)
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def lock(path: Path, what: str, remedy: str) -> Iterator[float | None]:
    """Holds `path`, whose directory exists, for this process alone; the file is deleted at the end.

    Yields when the last holder was alive, in seconds since the epoch, if it was killed; else None.
    BusyError where another process has it, `what` (of which the message says more: who holds it)
    and `remedy`: at once if that runs on this host, after two minutes on another.
    """
    last_alive = path.stat().st_mtime if path.exists() else None
    handle, by_kernel = _take(path, what, remedy)
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
        time.sleep(1.0)  # of two that found it free the last one has it
        if (holder := _holder(path)) != mine:
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
        os.close(_take(path, what, remedy, fcntl.LOCK_SH)[0])  # many may ask at once


def _take(path: Path, what: str, remedy: str, kind: int = fcntl.LOCK_EX) -> tuple[int, bool]:
    """An open file that nobody else holds, and whether the kernel says so."""
    end, first_beat, here = time.monotonic() + OTHER_HOST_SECONDS, None, socket.gethostname()
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UserError(
                f"{path} is a link, and is to be a file of its own", "Delete it"
            ) from None
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            if not _is_at(handle, path):
                os.close(handle)  # its holder ended just now, and deleted it
                continue
            holder = _holder(path)
            if holder.get("host", here) != here and _beats(
                handle
            ):  # the locks of this disk end at each host
                os.close(handle)
                raise _refusal(holder, what, remedy)
            return handle, True
        except OSError as error:
            holder, beat = _holder(path), os.fstat(handle).st_mtime_ns
            first_beat = first_beat or beat
            is_over, is_here = time.monotonic() > end, holder.get("host") == here
            runs = is_here and _started(holder["pid"]) == holder["started"]
            if error.errno in _NO_LOCKS:
                runs |= beat != first_beat
                if not runs and (not holder or is_here or is_over):
                    return handle, False
                is_over = False
            os.close(handle)
            if error.errno not in (*_HELD, *_NO_LOCKS):
                raise
        if runs or is_over:
            raise _refusal(holder, what, remedy)
        time.sleep(0.2)


def _refusal(holder: dict[str, Any], what: str, remedy: str) -> BusyError:
    who = (
        f"process {holder['pid']} on {holder['host']}, since {holder['time']}"
        if holder
        else "another process"
    )
    return BusyError(f"{what} by {who}", remedy)


def _holder(path: Path) -> dict[str, Any]:
    """Who wrote itself into the file; {} where nobody did, or where the writing is under way."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks: another one may get its number later. None where
    there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


def _is_at(handle: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _beats(handle: int) -> bool:
    """Whether a holder that was alive within the last minute still is."""
    beat, end = os.fstat(handle).st_mtime, time.monotonic() + 2.5 * BEAT_SECONDS
    if time.time() - beat > 6 * BEAT_SECONDS:
        return False
    while time.monotonic() < end:
        if os.fstat(handle).st_mtime != beat:
            return True
        time.sleep(0.2)
    return False


def _beat(handle: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):  # a disk that is away for a while
            os.utime(handle)
