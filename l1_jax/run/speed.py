"""How fast a run is: tokens per second, and the share of what the devices could do."""

import contextlib
import time
from collections.abc import Iterator


class SpeedMeter:
    """Tokens per second and model FLOPs utilisation since the last reading, pauses left out.

    Count with `tokens += n`.

    Args:
        flops_per_token: of a training step.
        peak_flops: of all devices, in FLOP/s; None leaves the utilisation out.
    """

    def __init__(self, flops_per_token: int, peak_flops: float | None):
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self.tokens = 0
        self._start = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside, by a later start."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The metrics since the last call; the next reading begins here."""
        now = time.perf_counter()
        metrics = self._rates(now)

        self.tokens = 0
        self._start = now
        return metrics

    def peek(self) -> dict[str, float]:
        """The rates since the last reading, which this is not."""
        return self._rates(time.perf_counter())

    def _rates(self, now: float) -> dict[str, float]:
        rate = self.tokens / (now - self._start)
        metrics = {"perf/tokens_per_second": rate}

        if self._peak_flops:
            metrics["perf/mfu"] = rate * self._flops_per_token / self._peak_flops

        return metrics
