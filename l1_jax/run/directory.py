"""The run directory: whose it is, what is in it, what a resumed run keeps of it."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from l1_jax import checkpoint
from l1_jax.cli import log
from l1_jax.errors import UserError

METRICS_FILE, RUN_FILE, TENSORBOARD = "metrics.jsonl", "run.json", "tensorboard"
_FILES = (checkpoint.CONFIG_FILE, METRICS_FILE, RUN_FILE)
_DIRECTORIES = (TENSORBOARD, "wandb", checkpoint.BEST)
_PATTERNS = ("checkpoint-*", "aside-checkpoint-*", ".saving-*", ".old-*", ".deleting-*")


def holds_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in _FILES) or bool(checkpoint.step_directories(run_dir))


def check_free(run_dir: Path) -> None:
    """Raises UserError where a run would be overwritten unasked."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"training.output_dir {run_dir} is a file", "Name a directory")
    if holds_run(run_dir):
        raise UserError(
            f"{run_dir} holds a run already",
            "Go on with it by --resume, replace it by --overwrite, or set another training.output_dir",
        )


def clear(run_dir: Path) -> None:
    """Deletes what a run wrote, and nothing else."""
    for path in (*map(run_dir.joinpath, _DIRECTORIES), *(p for pattern in _PATTERNS for p in run_dir.glob(pattern))):
        if path.is_dir():
            shutil.rmtree(path)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)


def find_resumed(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means; None where the run has none yet.

    Args:
        run_dir: the run's directory.
        resume: the path given with `--resume`; None where it was given alone.
    """
    if resume is None:
        steps = checkpoint.step_directories(run_dir)
        if not steps:
            log.info("no checkpoint in %s yet: starting at step 0", run_dir)
            return None
        return steps[max(steps)]
    steps = checkpoint.step_directories(Path(resume))  # a run directory means its newest here
    return steps[max(steps)] if steps else checkpoint.resolve(resume)


def rewind(run_dir: Path, step: int) -> None:
    """Makes the directory read as if the run had just reached `step`: later checkpoints aside, later rows dropped."""
    for later, path in checkpoint.step_directories(run_dir).items():
        if later > step:
            log.info("%s is past step %d: renamed to %s", path.name, step, checkpoint.set_aside(path).name)
    path = run_dir / METRICS_FILE
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if _row_step(line) <= step]
        write_text(path, "".join(kept))


def _row_step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut off by a kill
        return float("inf")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is seen whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def describe(run_dir: Path, facts: dict[str, Any]) -> str:
    """Writes run.json, the facts of the run as of its last start; returns the run's id, the same after a resume."""
    path = run_dir / RUN_FILE
    run_id = json.loads(path.read_text())["run_id"] if path.exists() else uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"run_id": run_id} | facts, indent=1) + "\n")
    return run_id
