"""Where metrics go: the console, metrics.jsonl, TensorBoard, Weights & Biases."""

import dataclasses
import importlib.util
import io
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from l1_jax.checkpoint.names import METRICS_FILE, SKIPPED_FILE
from l1_jax.config.schema import Config
from l1_jax.console import console, log
from l1_jax.errors import RunError, UserError
from l1_jax.training.section import TrainingConfig

# How a value is shown on the console; what is not here is for the files alone.
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/grad_norm": "grad norm {:.3f}",
    "val/loss": "validation loss {:.4f}",
    "val/perplexity": "perplexity {:,.6g}",
    "val/bits_per_byte": "bits/byte {:.4f}",
    "train/skipped": "skipped, {} in a row",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
    "perf/mfu": "MFU {:.1%}",
}


def check_wandb(training: TrainingConfig) -> None:
    """Raises UserError where W&B is asked for, and is absent or lets nobody in; before anything is
    written."""
    if (project := training.wandb_project) is None:
        return
    asked, or_null = (
        f"training.wandb_project is {project!r}, and",
        "or set training.wandb_project to null",
    )
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"{asked} wandb is not installed",
            f'Install it with pip install -e ".[wandb]", {or_null}',
        )
    import wandb

    try:
        wandb.Settings(project=project, run_name=training.wandb_run_name)
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except (wandb.Error, ValueError) as error:
        what = f"{asked} W&B says: {' '.join(str(error).split()).rstrip('.')}"
        raise UserError(what, f"Run `wandb login`, set WANDB_MODE=offline, {or_null}") from error


class Rows:
    """A file of JSON objects, one a line, that grows; each is there when `add` returns, so that a
    kill loses none.

    On a full or read-only disk `add` raises RunError, or with `warn` says it once, and tries again
    with the next row.
    """

    def __init__(self, path: Path, warn: bool):
        self._path, self._warn, self._said, self._rest = path, warn, False, b""
        self._file: io.FileIO | None = None

    def add(self, row: dict[str, Any]) -> None:
        self._rest += json.dumps(row).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Writes what is left. RunError where the disk has no room for it."""
        self._warn = False
        self._write()
        if self._file:
            self._file.close()

    def _write(self) -> None:
        if not self._rest:
            return
        try:
            self._file = self._file or io.FileIO(self._path, "a")
            while self._rest:
                self._rest = self._rest[self._file.write(self._rest) :]
            self._said = False
        except OSError as error:
            what = f"{self._path} could not be written ({error.strerror})"
            if not self._warn:
                remedy = (
                    "See that the disk has room and can be written, and run the same "
                    "command with `resume`"
                )
                raise RunError(what, remedy) from error
            if not self._said:
                log.warning(
                    "%s; its rows are kept, and written when it can be "
                    "(training.on_save_error: warn)",
                    what,
                )
            self._said = True


class Board:
    """Scalars for TensorBoard, which hides those of an earlier start from `step` on.

    Written by tensorboardX's inner writer: the outer one has a thread that a full disk ends, and
    then waits for it.
    """

    def __init__(self, directory: Path, step: int):
        hidden: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
        sys.modules.update(
            hidden
        )  # it would import torch wherever that is installed: seconds, and nothing to scalars
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        finally:
            for name in hidden:
                del sys.modules[name]
        self._scalar, self._event = summary.scalar, event_pb2.Event
        directory.mkdir(parents=True, exist_ok=True)
        self._writer: Any = event_file_writer.EventsWriter(str(directory / "events"))
        self._write(session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START), step=step)

    def add(self, step: int, numbers: dict[str, float | int]) -> None:
        for name, value in numbers.items():
            self._write(summary=self._scalar(name, value), step=step)
        self._do(lambda: self._writer.flush())

    def close(self) -> None:
        self._do(lambda: self._writer.close())

    def _write(self, **content: Any) -> None:
        self._do(lambda: self._writer.write_event(self._event(wall_time=time.time(), **content)))

    def _do(self, action: Callable[[], None]) -> None:
        try:
            if self._writer:
                action()
        except (
            OSError
        ) as error:  # curves are no reason to end a run: metrics.jsonl has the same numbers
            log.warning(
                "TensorBoard could not be written (%s): left off until the next start",
                error.strerror,
            )
            self._writer = None


class Tracker:
    """Writes rows of metrics and draws one live progress line, from `step` on. Used by one process
    of a run."""

    def __init__(self, run_dir: Path, config: Config, step: int, run_id: str):
        self._metrics, self._skipped = (
            Rows(run_dir / name, config.training.on_save_error == "warn")
            for name in (METRICS_FILE, SKIPPED_FILE)
        )
        self._board = Board(run_dir / "tensorboard", step + 1)
        self._wandb: Any = None
        if (training := config.training).wandb_project is not None:
            import wandb

            names: Any = {
                "project": training.wandb_project,
                "name": training.wandb_run_name,
                "id": run_id,
            }
            self._wandb = wandb.init(
                **names, resume="allow", dir=str(run_dir), config=dataclasses.asdict(config)
            )
            self._wandb.define_metric("step")
            self._wandb.define_metric(
                "*", step_metric="step"
            )  # what W&B draws over, instead of its own counter
        columns = (
            "step",
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            "left  {task.description}",
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=config.training.max_steps, completed=step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def advance(self, step: int, loss: float) -> None:
        """Moves the progress line."""
        self._progress.update(self._task, completed=step, description=f"loss {loss:.4f}")

    def log(self, step: int, values: dict[str, float | int | str]) -> None:
        """Writes one row of metrics."""
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self._metrics.add({"step": step, **row})
        numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
        self._board.add(
            step, {name: value for name, value in numbers.items() if math.isfinite(value)}
        )
        if self._wandb:
            # W&B drops a row before its own counter, as after a resume from an older step; without
            # `step` it counts on.
            counter = {"step": step} if step >= self._wandb.step else {}
            self._wandb.log({"step": step, **numbers}, **counter)
        shown = "  ".join(
            text.format(values[name]) for name, text in _SHOWN.items() if name in values
        )
        console.print(f"step {step:>6}  {shown}", markup=False)

    def record(self, report: dict[str, Any]) -> None:
        """Writes the report of a skipped step."""
        self._skipped.add(report)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._progress.stop()
        self._board.close()
        for file in (self._metrics, self._skipped):
            try:
                file.close()
            except RunError as error:
                if kind is None:
                    raise
                log.error("%s", error)  # beside what ends the run
        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)
