"""Ends a process that waits for something that does not come.

A scheduler can start it again then.
"""

import collections
import faulthandler
import os
import signal
import statistics
import threading
import time

# How long is waited, in median steps, where that is more than `training.hang_timeout_seconds`.
STEPS = 20

# Of so many steps the median is taken.
_REMEMBERED_STEPS = 99
# From the line on stderr, which needs Python, to the kernel's alarm.
_MARGIN_SECONDS = 1.0
_SHORTEST_WAIT_SECONDS = 0.01


class Watchdog:
    """While entered, ends the process where something announced does not end in time.

    What was announced by `expects` has to be followed by another such call within `seconds`.
    Otherwise the stacks of all threads go to stderr, and SIGALRM ends the process (exit code 142 in
    a shell). The alarm is the kernel's and its handler is in C, so that it works while C++ holds
    Python's lock. To be used by the main thread.

    Args:
        seconds: None never ends anything.
    """

    def __init__(self, seconds: float | None):
        self._seconds = seconds
        self._ended = threading.Event()
        self._steps: collections.deque[float] = collections.deque(maxlen=_REMEMBERED_STEPS)

        # What is waited for now.
        self._what = "the start-up"
        self._since = time.monotonic()
        self._limit = seconds or 0.0
        self._is_step = False

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

        self._what = what
        self._since = now
        self._is_step = is_step
        self._limit = max(self._seconds, STEPS * median)

        # The line of `_speak` comes first, where Python can run.
        signal.setitimer(signal.ITIMER_REAL, self._limit + _MARGIN_SECONDS)

    def _speak(self) -> None:
        """Writes what did not end, shortly before the alarm; runs in a thread of its own."""
        while not self._ended.wait(self._seconds_to_wait()):
            # Another one began meanwhile.
            if time.monotonic() < self._since + self._limit:
                continue

            what = (
                f"{self._what} has not ended in {self._limit:g} s (training.hang_timeout_seconds)"
            )
            remedy = "See the stacks below, and resume the run; or raise the limit"
            os.write(2, f"error: {what}. {remedy}.\n".encode())
            return

    def _seconds_to_wait(self) -> float:
        return max(_SHORTEST_WAIT_SECONDS, self._since + self._limit - time.monotonic())
