"""Compiled programs, kept on disk from one start to the next."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax._src import compilation_cache  # jax's own files are written in place, and what is damaged stays so
from jax._src.compilation_cache_interface import CacheInterface

from l1_jax.cli import log
from l1_jax.files import cache_home
from l1_jax.storage import is_url

MOST_BYTES = 1 << 30  # in all; a program takes some 0.1 MB for a small model on CPU
LEAST_SECONDS = 0.1  # of compiling: below it a file gains nothing (benchmarks/RESULTS.md)
_HASH_BYTES = 32


class CompiledPrograms(CacheInterface):
    """Files in `path`, each a SHA-256 and what it is of. Where they take more than `most_bytes`, those unused for the
    longest go. Any number of processes may share them: a file gets its name when it is whole, and nothing is an error.
    """

    def __init__(self, path: Path, most_bytes: int):
        self._path, self.most_bytes = path, most_bytes
        # What XLA compiles for a CPU is divided among its cores, which jax's key does not know of.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._suffix = f"-{cores}"

    def get(self, key: str) -> bytes | None:
        """What was put under `key`; None where that is not there, or damaged."""
        file = self._path / (key + self._suffix)
        try:
            content = file.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(content[_HASH_BYTES:]).digest() != content[:_HASH_BYTES]:
            log.warning("%s is damaged: it is compiled again", file)
            with contextlib.suppress(OSError):
                file.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(file)
        return content[_HASH_BYTES:]

    def put(self, key: str, value: bytes) -> None:
        """Keeps `value`, if the disk takes it."""
        with contextlib.suppress(OSError):  # the program is there, and the next start compiles it again
            descriptor, partial = tempfile.mkstemp(dir=self._path)
            try:
                with open(descriptor, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(partial, self._path / (key + self._suffix))
            except OSError:
                os.unlink(partial)
            self._evict()

    def _evict(self) -> None:
        files = [(entry.stat(), entry.path) for entry in os.scandir(self._path) if entry.is_file()]
        size = 0
        for stat, path in sorted(files, key=lambda file: file[0].st_mtime, reverse=True):
            size += stat.st_size
            if size > self.most_bytes:
                with contextlib.suppress(OSError):  # another process did it
                    os.unlink(path)


def keep_compiled(devices: list[jax.Device]) -> None:
    """Has jax keep what it compiles for `devices`, and load it at the next start: in JAX_COMPILATION_CACHE_DIR, else in
    `compiled` in the cache directory. To be called before anything is compiled for them."""
    asked = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    compilation_cache.reset_cache()
    # On several CPU devices one start in two hung in a collective of a loaded program (jaxlib 0.10.2, measured). And of
    # several processes the first alone writes, so theirs must be a place that they share, which only the user knows.
    if (len(devices) > 1 and devices[0].platform == "cpu") or (not asked and jax.process_count() > 1):
        jax.config.update("jax_compilation_cache_dir", None)
        return
    _unless_set("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    _unless_set("jax_persistent_cache_enable_xla_caches", "none")  # they have no limit, and put the place into the key
    if asked and is_url(asked):
        return
    try:
        path = Path(asked) if asked else cache_home() / "compiled"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it is run: nobody else may write it
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # the latter of a user without a home
        log.info("compiled programs are not kept, each start compiles them anew: %s", error)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    limit = jax.config.values["jax_compilation_cache_max_size"]
    kept = CompiledPrograms(path, MOST_BYTES if limit < 0 else limit)
    jax.config.update("jax_compilation_cache_dir", str(path))
    compilation_cache.get_file_cache = lambda path: (kept, path)


def _unless_set(name: str, value: Any) -> None:
    if name.upper() not in os.environ:
        jax.config.update(name, value)
