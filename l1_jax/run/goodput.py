"""Where the wall time of a run went, over all its starts: kept in run.json."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from l1_jax.console import log
from l1_jax.storage.files import write_text

# What is lost if the run goes on from an earlier step.
WORK = ("step", "data_wait", "eval")
KINDS = ("startup", "compile", *WORK, "save", "lost", "idle")

# Checkpoints whose work is remembered.
NOTES = 1000


class Goodput:
    """A clock that charges every second to one of `KINDS`.

    At first it charges to `startup`; inside `with clock("eval")`, to that. Only the process that
    calls `begin` writes.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._kind = "startup"
        self._since = time.perf_counter()
        self._began = time.time()

        # From `begin` on: the file, what else stands in it, and the work up to each checkpoint.
        self._path: Path | None = None
        self._facts: dict[str, Any] = {}
        self._work: dict[int, str] = {}

    @contextlib.contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        self._charge()
        outer = self._kind
        self._kind = kind
        try:
            yield
        finally:
            self._charge()
            self._kind = outer

    def begin(
        self,
        path: Path,
        facts: dict[str, Any],
        before: dict[str, Any],
        step: int,
        alive: float | None,
    ) -> None:
        """Goes on with the account of the starts so far, and writes it from now on.

        Args:
            path: of the file.
            facts: what else stands in it.
            before: the account of the starts so far; empty at the first.
            step: of the checkpoint that the run goes on from.
            alive: when the last start had its last sign of life, if it was killed; in seconds since
                1970.
        """
        self._path = path
        self._facts = facts
        self._work = {}
        if before:
            self._add(before, step, alive)
        self.write()

    def _add(self, before: dict[str, Any], step: int, alive: float | None) -> None:
        """Adds the account of the starts so far, less what the checkpoint does not hold."""
        seconds = before["seconds"]
        written = before["written"]
        for noted, work in before["work"].items():
            if int(noted) <= step:
                self._work[int(noted)] = work

        # Between its last writing and its death, a killed start did what nobody wrote down.
        unseen = max(0.0, (alive or 0.0) - written)
        idle = max(0.0, self._began - written - unseen)

        kept = self._kept(step)
        undone = sum(seconds[kind] - kept[kind] for kind in WORK)

        for kind, value in seconds.items():
            self.seconds[kind] += kept.get(kind, value)
        self.seconds["lost"] += unseen + undone
        self.seconds["idle"] += idle

    def saving(self, step: int) -> None:
        """Notes the work that the checkpoint of `step` stands for, and writes."""
        self._charge()
        if self._path:
            self._work[step] = " ".join(f"{self.seconds[kind]:.3f}" for kind in WORK)
            latest = sorted(self._work.items())[-NOTES:]
            self._work = dict(latest)
            self.write()

    def went_back(self, step: int) -> None:
        """Says that what was done since the checkpoint of `step` is thrown away."""
        self._charge()
        if self._path:
            kept = self._kept(step)
            self.seconds["lost"] += sum(self.seconds[kind] - kept[kind] for kind in WORK)
            self.seconds |= kept

    def _kept(self, step: int) -> dict[str, float]:
        """The work up to the checkpoint of `step`, or to the last before it that has a note."""
        noted = [at for at in self._work if at <= step]
        if not noted:
            return dict.fromkeys(WORK, 0.0)

        seconds = map(float, self._work[max(noted)].split())
        return dict(zip(WORK, seconds, strict=True))

    def write(self) -> None:
        """Writes the account, if this process is the one that does."""
        self._charge()
        if self._path is None:
            return

        account = {
            "written": time.time(),
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
            "work": self._work,
        }
        text = json.dumps(self._facts | {"goodput": account}, indent=1) + "\n"
        try:
            write_text(self._path, text)
        except OSError as error:
            # An account is no reason to end a run, nor to hide why it ended.
            log.warning("%s could not be written: %s", self._path, error.strerror)

    def __str__(self) -> str:
        self._charge()
        total = sum(self.seconds.values())
        share = self.seconds["step"] / total

        parts = [f"{kind.replace('_', ' ')} {value:.1f}" for kind, value in self.seconds.items()]
        return f"goodput {share:.1%} of {total:.1f} s since the first start: {', '.join(parts)}"

    def _charge(self) -> None:
        """Adds the time since the last call to the kind of now."""
        now = time.perf_counter()
        self.seconds[self._kind] += now - self._since
        self._since = now
