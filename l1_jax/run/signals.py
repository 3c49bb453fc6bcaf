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
    """While entered, a thread of its own hears SIGTERM, SIGINT, and SIGHUP unless that is ignored,
    as under `nohup`; even where the main thread is in a compiler.

    Before `saving` is called there is nothing to save, and the first signal ends the process at
    once with code 75. After it the first is noted in `received`, and the process has
    `grace_seconds` to save and end; when they are over, or at a second signal, it ends at once with
    128 and the signal's number, as if killed by it.

    After `finished` nothing is left to do, and it ends with 0 in any case.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.received: int | None = None
        self._grace, self._is_saving = grace_seconds, False
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
                if data[0] not in ASKING:
                    continue
                if not self._is_saving and not self._is_finished:
                    _leave(
                        EXIT_STOPPED,
                        "stopped by a signal before the first step: resume it, or begin again",
                    )
                if self.received is not None:
                    self._end(data[0], "a second signal: ending at once, without saving")
                self.received = data[0]
                self._heard.settimeout(self._grace)
        except TimeoutError:
            assert self.received is not None
            if not self._is_finished:
                faulthandler.dump_traceback(2)
            what = (
                f"error: not saved in the {self._grace:g} s since the signal. Raise "
                "training.grace_seconds"
            )
            self._end(self.received, f"{what}, or see above what it waits for.")

    def _end(self, number: int, message: str) -> None:
        """Ends the process for a signal, `message` says with what loss, unless nothing can be lost
        any more."""
        if self._is_finished:
            _leave(EXIT_OK, "ended by a signal: the run is finished and saved")
        else:
            _leave(128 + number, message)


def ignore() -> None:
    """No signal that can be ignored changes any more how this process ends."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def _leave(code: int, message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, f"{message}\n".encode())  # the main thread may be inside of print
    on_exit.close()
    os._exit(code)
