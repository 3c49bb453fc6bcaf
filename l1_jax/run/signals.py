"""Signals that ask a run to stop: the step in hand is finished and saved first."""

import contextlib
import faulthandler
import os
import signal
import socket
import threading

from l1_jax.console import EXIT_OK, EXIT_STOPPED, on_exit

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """While entered, a thread of its own hears signals that ask the run to stop.

    These are SIGTERM, SIGINT, and SIGHUP unless that is ignored, as under `nohup`. They are heard
    even where the main thread is in a compiler.

    Before `saving` is called there is nothing to save, and the first signal ends the process at
    once with code 75.

    After it the first is noted in `received`, and the process has the grace to save and end. When
    that is over, or at a second signal, it ends at once with 128 and the signal's number, as if
    killed by it.

    After `finished` nothing is left to do, and it ends with 0 in any case.

    Args:
        grace_seconds: from the first signal to the end.

    Attributes:
        received: the signal's number; None before it.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.received: int | None = None
        self._grace_seconds = grace_seconds
        self._is_saving = False
        self._is_finished = False

    def __enter__(self) -> "StopSignals":
        self._heard, self._tell = socket.socketpair()
        self._tell.setblocking(False)

        # Python's own handlers run between two lines of the main thread; what it writes to this is
        # written at once.
        self._wakeup = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)

        numbers = [number for number in ASKING if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, lambda *_: None) for number in numbers}

        self._thread = threading.Thread(target=self._hear, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)

        # This ends the thread.
        self._tell.close()
        self._thread.join()
        self._heard.close()

    def saving(self, is_saving: bool = True) -> None:
        """From now on there is something to save; or nothing, until the next call."""
        self._is_saving = is_saving

    def finished(self) -> None:
        """From now on the run is done, and all of it is saved."""
        self._is_finished = True

    def _hear(self) -> None:
        try:
            while data := self._heard.recv(1):
                number = data[0]
                if number in ASKING:
                    self._take(number)
        except TimeoutError:
            assert self.received is not None
            if not self._is_finished:
                faulthandler.dump_traceback(2)

            what = f"error: not saved in the {self._grace_seconds:g} s since the signal"
            remedy = "Raise training.grace_seconds, or see above what it waits for"
            self._end(self.received, f"{what}. {remedy}.")

    def _take(self, number: int) -> None:
        if not self._is_saving and not self._is_finished:
            _leave(
                EXIT_STOPPED,
                "stopped by a signal before the first step: resume the run to begin it",
            )

        if self.received is not None:
            self._end(number, "a second signal: ending at once, without saving")

        self.received = number
        self._heard.settimeout(self._grace_seconds)

    def _end(self, number: int, message: str) -> None:
        """Ends the process for a signal.

        Args:
            number: of the signal.
            message: says with what loss, unless nothing can be lost any more.
        """
        if self._is_finished:
            _leave(EXIT_OK, "ended by a signal: the run is finished and saved")
        else:
            _leave(128 + number, message)


def ignore() -> None:
    """Has no signal that can be ignored change any more how this process ends."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def _leave(code: int, message: str) -> None:
    # The terminal may be gone, and the main thread may be inside of print.
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode())

    on_exit.close()
    os._exit(code)
