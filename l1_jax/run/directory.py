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

METRICS_FILE, RUN_FILE = "metrics.jsonl", "run.json"
_FILES = (checkpoint.CONFIG_FILE, METRICS_FILE, RUN_FILE)
_DIRECTORIES = ("tensorboard", "wandb", checkpoint.BEST, "checkpoint-*", "aside-*", *checkpoint.LEFTOVERS)


def check_free(run_dir: Path) -> None:
    """Raises UserError where a run would be overwritten unasked."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"training.output_dir {run_dir} is a file", "Name a directory")
    if any((run_dir / name).exists() for name in _FILES) or checkpoint.step_directories(run_dir):
        remedy = "Go on with it by --resume, replace it by --overwrite, or set another training.output_dir"
        raise UserError(f"{run_dir} holds a run already", remedy)


def clear(run_dir: Path) -> None:
    """Deletes what a run wrote, and nothing else."""
    for pattern in _DIRECTORIES:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path)
    for name in _FILES:
        (run_dir / name).unlink(missing_ok=True)


def find_resumed(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means: `resume` itself, or the newest of the run; None where it has none yet."""
    if resume and not Path(resume).resolve().is_relative_to(run_dir.resolve()):
        check_free(run_dir)  # going on from another run's checkpoint
    steps = checkpoint.step_directories(Path(resume) if resume else run_dir)
    if steps:
        return steps[max(steps)]
    if resume:
        return checkpoint.resolve(resume)
    log.info("no checkpoint in %s yet: starting at step 0", run_dir)
    return None


def rewind(run_dir: Path, step: int) -> None:
    """Makes the directory read as if the run had just reached `step`: later checkpoints aside, later rows dropped."""
    for info in [*run_dir.glob(f"*/{checkpoint.INFO_FILE}")]:
        path = info.parent
        if not path.name.startswith("aside-") and checkpoint.read_info(path).step > step:
            taken = len(list(run_dir.glob(f"aside-{path.name}.*")))
            aside = path.rename(run_dir / f"aside-{path.name}.{taken + 1}")
            log.info("%s is past step %d: renamed to %s", path.name, step, aside.name)
    metrics = run_dir / METRICS_FILE
    if metrics.exists():
        whole = [row for row in metrics.read_text().splitlines(True) if row.endswith("\n")]  # a kill cuts the last one
        write_text(metrics, "".join(row for row in whole if json.loads(row)["step"] <= step))


def describe(run_dir: Path, facts: dict[str, Any]) -> str:
    """Writes run.json, the facts of the run as of its last start; returns the run's id, the same after a resume."""
    path = run_dir / RUN_FILE
    run_id = json.loads(path.read_text())["run_id"] if path.exists() else uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"run_id": run_id} | facts, indent=1) + "\n")
    return run_id


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is seen whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
