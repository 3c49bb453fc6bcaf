"""What a signal does to a command: one line, and the exit code that a shell expects.

A run that trains has its own way, see `run.signals`.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

# From a signal to the end of the process, where the command clears up behind itself.
UNWIND_SECONDS = 5.0

# Whether the command is in a part that clears up behind itself.
_unwinds = False
# Whether Interrupted was raised in that part.
_raised = False


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end; `code` is what it ends with."""

    def __init__(self, number: int):
        super().__init__()
        self.code = 128 + number


def hear() -> None:
    """Has SIGINT and SIGTERM end the process at once, with a line instead of a traceback.

    For the time of imports.
    """
    _replace(_end)


def hear_before_a_run() -> None:
    """Has SIGINT and SIGTERM end a process that is about to train.

    Nothing is lost, and the code is that which has a scheduler start it again. Later `StopSignals`
    hears them.
    """
    for number in SIGNALS:
        signal.signal(number, _stop_before_a_run)


def _stop_before_a_run(*_: object) -> NoReturn:
    os.write(2, b"stopped by a signal before the first step: run it again, with --resume\n")
    os._exit(75)


class Interruptible:
    """While entered, a thread of its own hears SIGINT and SIGTERM, and ends the process at once.

    Nothing is raised: Python would do that between two lines of the main thread, which may be in a
    compiler for minutes, and the extensions of jax abort where it comes while they are imported.

    Args:
        at_end: called before the process ends.
    """

    def __init__(self, at_end: Callable[[], None]):
        self._at_end = at_end

    def __enter__(self) -> "Interruptible":
        global _raised
        _raised = False

        self._heard, self._tell = socket.socketpair()
        self._tell.setblocking(False)

        self._is_ours = _replace(_raise_where_it_unwinds)
        if self._is_ours:
            self._wakeup = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)

        self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            signal.set_wakeup_fd(self._wakeup)

        # What is left is the end of Python, which a signal may end without a word.
        for number in SIGNALS:
            if signal.getsignal(number) is _raise_where_it_unwinds:
                signal.signal(number, signal.SIG_DFL)

        self._tell.close()
        self._thread.join()
        self._heard.close()

    def _watch(self) -> None:
        number = self._next()
        has_ended = number == 0
        if has_ended:
            return

        # The main thread raises, and clears up: it ends the command in time, or a second signal
        # comes, or it takes too long.
        if _unwinds or _raised:
            self._heard.settimeout(UNWIND_SECONDS)
            with contextlib.suppress(TimeoutError):
                has_ended = self._next() == 0
            if has_ended:
                return

        self._at_end()
        _end(number)

    def _next(self) -> int:
        """The next of our signals; 0 when there will be none."""
        while data := self._heard.recv(1):
            if data[0] in SIGNALS:
                return data[0]

        return 0


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """A part of a command that clears up behind itself: a signal raises Interrupted in it.

    Where that does not end it in `UNWIND_SECONDS`, or at a second signal, the process ends at once.
    Nothing may be imported in it.
    """
    global _unwinds
    _unwinds = True
    try:
        yield
    finally:
        _unwinds = False


def _replace(handler: Callable[[int, FrameType | None], Any]) -> bool:
    """Sets a handler, and returns whether for any signal.

    Left alone are signals that are ignored, as in what a shell runs in the background, and those
    for which the command has a handler of its own.
    """
    replaceable = (signal.SIG_DFL, signal.default_int_handler, _end)
    numbers = [number for number in SIGNALS if signal.getsignal(number) in replaceable]
    for number in numbers:
        signal.signal(number, handler)
    return bool(numbers)


def _raise_where_it_unwinds(number: int, _: FrameType | None) -> None:
    global _raised
    if _unwinds and not _raised:
        _raised = True
        raise Interrupted(number)


def _end(number: int, _: FrameType | None = None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
