"""Compiled programs, kept on disk from one start to the next."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from l1_jax.console import log
from l1_jax.storage.files import cache_home
from l1_jax.storage.remote import is_url

MOST_BYTES = 1 << 30  # in all; a program takes some 0.1 MB for a small model on CPU
LEAST_SECONDS = 0.1  # of compiling: below it a file gains nothing (benchmarks/RESULTS.md)

_PLACE = "jax_compilation_cache_dir"


def keep_compiled(devices: list[jax.Device]) -> None:
    """Has jax keep what it compiles for `devices`, and load it at the next start.

    It lies in JAX_COMPILATION_CACHE_DIR, else in `compiled` in the cache directory. To be called
    before anything is compiled for the devices.
    """
    if not jax.config.values["jax_enable_compilation_cache"]:
        return

    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    is_cpu = devices[0].platform == "cpu"
    compilation_cache.reset_cache()

    # On several CPU devices one start in two hung in a collective of a loaded program (jaxlib
    # 0.10.2, measured).
    may_hang = is_cpu and len(devices) > 1
    # Of several processes the first alone writes. So theirs must be a place that they share, which
    # only the user knows.
    is_unshared = not asked and jax.process_count() > 1
    if may_hang or is_unshared:
        jax.config.update(_PLACE, None)
        return

    _unless_set("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    # XLA's own caches have no limit, and put the place into the key.
    _unless_set("jax_persistent_cache_enable_xla_caches", "none")
    if asked and is_url(asked):
        return

    try:
        place = _make_place(asked, is_cpu)
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        log.info("compiled programs are not kept, each start compiles them anew: %s", error)
        jax.config.update(_PLACE, None)
        return
    jax.config.update(_PLACE, str(place))


def _make_place(asked: str | None, is_cpu: bool) -> Path:
    """The directory for the programs, made and found writable, private and not too full."""
    root = Path(asked) if asked else cache_home() / "compiled"
    # What XLA compiles for a CPU is divided among its cores, which jax's key does not know of.
    path = root / f"{_num_cores()}-cores" if is_cpu else root

    # What is in it is run: nobody else may write it.
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    tempfile.TemporaryFile(dir=path).close()

    # What the user asked for is the user's to guard and to empty.
    if not asked:
        check_private(root)
        evict(root, MOST_BYTES)
    return path


def check_private(path: Path) -> None:
    """Checks that nobody else may write to a directory: what it holds is run.

    Raises:
        PermissionError: others own it, or may write to it.
    """
    found = path.stat()
    is_ours = found.st_uid == os.getuid()
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not is_ours or others_write:
        raise PermissionError(f"others may write to {path}")


class _CachedFile(NamedTuple):
    """A file of the cache; sorts by when it was last used."""

    used: float  # seconds since 1970
    size: int
    path: Path


def evict(path: Path, most_bytes: int) -> None:
    """Deletes the files below `path` that were not used for the longest.

    The rest takes at most `most_bytes`. At each start, and not by jax_compilation_cache_max_size:
    that has a lock for each read, and a process killed between the two files of a program makes
    every later write fail (jax 0.10.2).
    """
    files = []
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            found = file.lstat()
            if stat.S_ISREG(found.st_mode):
                used = max(found.st_atime, found.st_mtime)
                files.append(_CachedFile(used, found.st_size, file))

    total = 0
    for cached in sorted(files, reverse=True):
        total += cached.size
        if total > most_bytes:
            cached.path.unlink(missing_ok=True)


def _num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _unless_set(name: str, value: Any) -> None:
    """Sets a setting of jax, where the user did not set it in the environment."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)
