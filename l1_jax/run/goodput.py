"""Where the wall time of a run went, over all its starts: kept in run.json."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.console import log
from l1_jax.storage.files import write_text

WORK = ("step", "data_wait", "eval")  # what is lost if the run goes on from an earlier step
NOTES = 1000  # checkpoints whose work is remembered
KINDS = ("startup", "compile", *WORK, "save", "lost", "idle")


class Goodput:
    """A clock that charges every second to one of `KINDS`: at first to `startup`, inside `with clock("eval")` to that.

    Only the process that calls `begin` writes.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._kind, self._since, self._began = "startup", time.perf_counter(), time.time()
        self._path: Path | None = None

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        self._charge()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._charge()
            self._kind = outer

    def begin(self, path: Path, facts: dict[str, Any], before: dict[str, Any], step: int, alive: float | None) -> None:
        """Goes on with the account `before`, that of the starts so far, from the checkpoint of `step`, and writes to
        `path` from now on, beside `facts`. `alive`: when the last start had its last sign of life, if it was killed."""
        self._path, self._facts, self._work = path, facts, {}
        if before:
            seconds, written = before["seconds"], before["written"]
            self._work = {int(at): work for at, work in before["work"].items() if int(at) <= step}
            kept = self._kept(step)
            unseen = max(0.0, (alive or 0.0) - written)  # between its last writing and its death
            idle = max(0.0, self._began - written - unseen)
            for kind, value in seconds.items():
                self.seconds[kind] += kept.get(kind, value)
            self.seconds["lost"] += unseen + sum(seconds[kind] - kept[kind] for kind in WORK)
            self.seconds["idle"] += idle
        self.write()

    def saving(self, step: int) -> None:
        """Notes the work that the checkpoint of `step` stands for, and writes."""
        self._charge()
        if self._path:
            self._work[step] = " ".join(f"{self.seconds[kind]:.3f}" for kind in WORK)
            self._work = dict(sorted(self._work.items())[-NOTES:])
            self.write()

    def went_back(self, step: int) -> None:
        """Says that what was done since the checkpoint of `step` is thrown away."""
        self._charge()
        if self._path:
            kept = self._kept(step)
            self.seconds["lost"] += sum(self.seconds[kind] - kept[kind] for kind in WORK)
            self.seconds |= kept

    def _kept(self, step: int) -> dict[str, float]:
        """The work up to the checkpoint of `step`, or to the last one before it of which there is a note."""
        at = max((at for at in self._work if at <= step), default=None)
        return dict(zip(WORK, map(float, self._work[at].split() if at is not None else (0, 0, 0)), strict=True))

    def write(self) -> None:
        """Writes the account, if this process is the one that does."""
        self._charge()
        if self._path:
            seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
            account = {"written": time.time(), "seconds": seconds, "work": self._work}
            try:
                write_text(self._path, json.dumps(self._facts | {"goodput": account}, indent=1) + "\n")
            except OSError as error:  # an account is no reason to end a run, nor to hide why it ended
                log.warning("%s could not be written: %s", self._path, error.strerror)

    def __str__(self) -> str:
        self._charge()
        total = sum(self.seconds.values())
        shares = ", ".join(f"{kind.replace('_', ' ')} {value:.1f}" for kind, value in self.seconds.items())
        return f"goodput {self.seconds['step'] / total:.1%} of {total:.1f} s since the first start: {shares}"

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._kind] += now - self._since
        self._since = now
