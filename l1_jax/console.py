"""What a person sees: log lines, the progress line, errors, exit codes."""

import atexit
import contextlib
import errno
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 2
# To be started again: EX_TEMPFAIL of sysexits.h.
EXIT_STOPPED = 75

# What is not a mistake of ours when something cannot be written.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class _Tolerant:
    """A stream whose reader may leave, or whose terminal be closed: no run ends for that."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Console(Console):
    @property
    def file(self) -> Any:
        return _Tolerant(super().file)

    @file.setter
    def file(self, new: Any) -> None:
        self._file = new


# Everything meant for a person goes to stderr, so that stdout holds results alone.
console = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
log = logging.getLogger("l1_jax")

# Closed at the end of a command, whatever ends it.
on_exit = contextlib.ExitStack()
atexit.register(on_exit.close)

# Ends the process. One of several processes has another way to go.
leave: Callable[[int], NoReturn] = sys.exit
