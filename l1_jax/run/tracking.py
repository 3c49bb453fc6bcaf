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
    """Checks that W&B can be used where it is asked for; before anything is written.

    Raises:
        UserError: it is absent, or lets nobody in.
    """
    project = training.wandb_project
    if project is None:
        return

    asked = f"training.wandb_project is {project!r}, and"
    or_null = "or set training.wandb_project to null"

    if importlib.util.find_spec("wandb") is None:
        what = f"{asked} wandb is not installed"
        raise UserError(what, f'Install it with pip install -e ".[wandb]", {or_null}')

    import wandb

    try:
        wandb.Settings(project=project, run_name=training.wandb_run_name)
        if wandb.setup().settings.mode == "online":
            wandb.login()
    except (wandb.Error, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        what = f"{asked} W&B says: {reason}"
        raise UserError(what, f"Run `wandb login`, set WANDB_MODE=offline, {or_null}") from error


class Rows:
    """A file of JSON objects, one a line, that grows.

    Each is there when `add` returns, so that a kill loses none.

    Args:
        path: of the file.
        warn: what `add` does on a full or read-only disk. With it the fault is said once, and the
            next row tries again; else it raises RunError.
    """

    def __init__(self, path: Path, warn: bool):
        self._path = path
        self._warn = warn
        self._file: io.FileIO | None = None

        # What could not be written yet, and whether that was said.
        self._rest = b""
        self._said = False

    def add(self, row: dict[str, Any]) -> None:
        """Appends one object."""
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
                num_written = self._file.write(self._rest)
                self._rest = self._rest[num_written:]
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
    """Scalars for TensorBoard.

    Written by tensorboardX's inner writer: the outer one has a thread that a full disk ends, and
    then waits for it.

    Args:
        directory: of its files.
        step: TensorBoard hides those of an earlier start from this step on.
    """

    def __init__(self, directory: Path, step: int):
        # tensorboardX would import torch wherever that is installed: seconds, and nothing to
        # scalars.
        hidden: dict[str, Any] = {} if "torch" in sys.modules else {"torch": None}
        sys.modules.update(hidden)
        try:
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto import event_pb2
        finally:
            for name in hidden:
                del sys.modules[name]

        self._scalar = summary.scalar
        self._event = event_pb2.Event

        directory.mkdir(parents=True, exist_ok=True)
        # None once it could not be written.
        self._writer: Any = event_file_writer.EventsWriter(str(directory / "events"))

        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(session_log=start, step=step)

    def add(self, step: int, numbers: dict[str, float | int]) -> None:
        """Writes the scalars of a step."""
        for name, value in numbers.items():
            self._write(summary=self._scalar(name, value), step=step)
        self._do(lambda: self._writer.flush())

    def close(self) -> None:
        self._do(lambda: self._writer.close())

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._do(lambda: self._writer.write_event(event))

    def _do(self, action: Callable[[], None]) -> None:
        try:
            if self._writer:
                action()
        except OSError as error:
            # Curves are no reason to end a run: metrics.jsonl has the same numbers.
            log.warning(
                "TensorBoard could not be written (%s): left off until the next start",
                error.strerror,
            )
            self._writer = None


class Tracker:
    """Writes rows of metrics and draws one live progress line. Used by one process of a run.

    Args:
        run_dir: where the files are.
        config: of the run.
        step: from which on.
        run_id: the same at every start of the run.
    """

    def __init__(self, run_dir: Path, config: Config, step: int, run_id: str):
        warn = config.training.on_save_error == "warn"
        self._metrics = Rows(run_dir / METRICS_FILE, warn)
        self._skipped = Rows(run_dir / SKIPPED_FILE, warn)
        self._board = Board(run_dir / "tensorboard", step + 1)
        self._wandb = _start_wandb(run_dir, config, run_id)

        self._progress = Progress(
            "step",
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            "left  {task.description}",
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=config.training.max_steps, completed=step)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def advance(self, step: int, loss: float) -> None:
        """Moves the progress line."""
        self._progress.update(self._task, completed=step, description=f"loss {loss:.4f}")

    def log(self, step: int, values: dict[str, float | int | str]) -> None:
        """Writes one row of metrics."""
        row: dict[str, Any] = {"step": step}
        numbers = {}
        for name, value in values.items():
            is_finite = isinstance(value, str) or math.isfinite(value)
            # JSON has no infinity.
            row[name] = value if is_finite else None
            if not isinstance(value, str):
                numbers[name] = value

        self._metrics.add(row)
        finite = {name: number for name, number in numbers.items() if math.isfinite(number)}
        self._board.add(step, finite)

        if self._wandb:
            # W&B drops a row before its own counter, as after a resume from an older step; without
            # `step` it counts on.
            counter = {"step": step} if step >= self._wandb.step else {}
            self._wandb.log({"step": step, **numbers}, **counter)

        shown = [text.format(values[name]) for name, text in _SHOWN.items() if name in values]
        console.print(f"step {step:>6}  {'  '.join(shown)}", markup=False)

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
                # Beside what ends the run.
                log.error("%s", error)

        if self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)


def _start_wandb(run_dir: Path, config: Config, run_id: str) -> Any:
    """The run in W&B; None where that is not asked for."""
    training = config.training
    if training.wandb_project is None:
        return None

    import wandb

    run = wandb.init(
        project=training.wandb_project,
        name=training.wandb_run_name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        config=dataclasses.asdict(config),
    )

    # What W&B draws over, instead of its own counter.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
