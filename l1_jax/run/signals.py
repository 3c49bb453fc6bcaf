"""Signals that ask a run to stop: the step in hand is finished and saved first."""

import signal
from types import FrameType


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is noted in `received`; a second one ends the process at once."""

    received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(number, signal.SIG_DFL)
