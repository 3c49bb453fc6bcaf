"""How fast a run is: tokens per second, and the share of what the devices could do."""

import contextlib
import time
from collections.abc import Iterator

from l1_jax.model.flops import flops_per_token
from l1_jax.model.section import ModelConfig


class SpeedMeter:
    """Tokens per second and model FLOPs utilisation since the last reading, pauses left out.

    Count with `tokens += n`. `peak_flops` is of all devices, in FLOP/s; None leaves the utilisation out.
    """

    def __init__(self, num_parameters: int, model: ModelConfig, peak_flops: float | None):
        self._flops_per_token = flops_per_token(num_parameters, model)
        self._peak = peak_flops
        self.tokens, self._start = 0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        now = time.perf_counter()
        rates = self._rates(now)
        self.tokens, self._start = 0, now
        return rates

    def peek(self) -> dict[str, float]:
        """The rates since the last reading, which this is not."""
        return self._rates(time.perf_counter())

    def _rates(self, now: float) -> dict[str, float]:
        rate = self.tokens / (now - self._start)
        mfu = {"perf/mfu": rate * self._flops_per_token / self._peak} if self._peak else {}
        return {"perf/tokens_per_second": rate} | mfu
