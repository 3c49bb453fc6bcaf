"""Compiled programs, kept on disk from one start to the next."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from l1_jax.console import log
from l1_jax.storage.files import cache_home
from l1_jax.storage.remote import is_url

MOST_BYTES = 1 << 30  # in all; a program takes some 0.1 MB for a small model on CPU
LEAST_SECONDS = 0.1  # of compiling: below it a file gains nothing (benchmarks/RESULTS.md)


def keep_compiled(devices: list[jax.Device]) -> None:
    """Has jax keep what it compiles for `devices`, and load it at the next start: in JAX_COMPILATION_CACHE_DIR, else in
    `compiled` in the cache directory. To be called before anything is compiled for them."""
    if not jax.config.values["jax_enable_compilation_cache"]:
        return
    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compilation_cache.reset_cache()
    is_cpu = devices[0].platform == "cpu"
    # On several CPU devices one start in two hung in a collective of a loaded program (jaxlib 0.10.2, measured). And of
    # several processes the first alone writes, so theirs must be a place that they share, which only the user knows.
    if (len(devices) > 1 and is_cpu) or (not asked and jax.process_count() > 1):
        jax.config.update("jax_compilation_cache_dir", None)
        return
    _unless_set("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    _unless_set("jax_persistent_cache_enable_xla_caches", "none")  # they have no limit, and put the place into the key
    if asked and is_url(asked):
        return
    try:
        root = Path(asked) if asked else cache_home() / "compiled"
        # What XLA compiles for a CPU is divided among its cores, which jax's key does not know of.
        path = root / f"{_num_cores()}-cores" if is_cpu else root
        path.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is run: nobody else may write it
        tempfile.TemporaryFile(dir=path).close()
        if not asked:
            check_private(root)
            evict(root, MOST_BYTES)
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        log.info("compiled programs are not kept, each start compiles them anew: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))


def check_private(path: Path) -> None:
    """PermissionError where others own the directory or may write to it: what it holds is run."""
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {path}")


def evict(path: Path, most_bytes: int) -> None:
    """Deletes the files below `path` that were not used for the longest, until the rest takes at most `most_bytes`.

    At each start, and not by jax_compilation_cache_max_size: that has a lock for each read, and a process killed
    between the two files of a program makes every later write fail (jax 0.10.2).
    """
    used = []
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another process deleted it
            found = file.lstat()
            if stat.S_ISREG(found.st_mode):
                used.append((max(found.st_atime, found.st_mtime), found.st_size, file))
    size = 0
    for _, file_size, file in sorted(used, reverse=True):
        size += file_size
        if size > most_bytes:
            file.unlink(missing_ok=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unless_set(name: str, value: Any) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)
