"""Ends a process that waits for something that does not come, so that a scheduler can start it again."""

import collections
import faulthandler
import os
import signal
import statistics
import threading
import time

STEPS = 20  # times the median step, where that is more than `training.hang_timeout_seconds`


class Watchdog:
    """While entered, what was announced by `expects` has to be followed by another such call within `seconds`.

    Otherwise the stacks of all threads go to stderr, and SIGALRM ends the process (exit code 142 in a shell). The alarm
    is the kernel's and its handler is in C, so that it works while C++ holds Python's lock. None never ends anything.
    To be used by the main thread.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._ended = seconds, threading.Event()
        self._steps: collections.deque[float] = collections.deque(maxlen=99)
        self._what, self._since, self._limit, self._is_step = "the start-up", time.monotonic(), seconds or 0.0, False

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)
            self.expects(self._what)
            threading.Thread(target=self._speak, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.unregister(signal.SIGALRM)

    def expects(self, what: str, is_step: bool = False) -> None:
        """Says that `what` begins, and that what began before it has ended."""
        if self._seconds is None:
            return
        now = time.monotonic()
        if self._is_step:
            self._steps.append(now - self._since)
        median = statistics.median(self._steps) if self._steps else 0.0
        self._what, self._since, self._is_step = what, now, is_step
        self._limit = max(self._seconds, STEPS * median)
        signal.setitimer(signal.ITIMER_REAL, self._limit + 1.0)  # the line below comes first, where Python can run

    def _speak(self) -> None:
        while not self._ended.wait(max(0.01, self._since + self._limit - time.monotonic())):
            if time.monotonic() >= self._since + self._limit:
                what = f"error: {self._what} has not ended in {self._limit:g} s (training.hang_timeout_seconds)"
                remedy = "See the stacks below, and run the same command again, with --resume; or raise the limit"
                os.write(2, f"{what}. {remedy}.\n".encode())
                return
