"""The run directory: whose it is, what is in it, what a resumed run keeps of it."""

import itertools
import json
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from l1_jax import checkpoint
from l1_jax.cli import log
from l1_jax.errors import UserError
from l1_jax.files import check_inside, read_json, read_text, write_text
from l1_jax.mirror import RUN_FILE, local
from l1_jax.storage import is_url, shown

METRICS_FILE = "metrics.jsonl"
FILES = (checkpoint.CONFIG_FILE, METRICS_FILE, RUN_FILE)
_LOGS = ("tensorboard", "wandb")


def check_files(run_dir: Path, resume: bool) -> None:
    """Raises UserError where a link leads what a run reads, writes or deletes out of its directory, or where `resume`
    would meet a damaged file."""
    names = [path.name for pattern in ("checkpoint-*", "aside-*", ".*-*") for path in run_dir.glob(pattern)]
    check_inside(run_dir, *FILES, *_LOGS, checkpoint.BEST, *names)
    run_file, metrics = run_dir / RUN_FILE, run_dir / METRICS_FILE
    if resume and run_file.exists() and not isinstance(read_json(run_file, 1 << 20).get("run_id"), str):
        raise UserError(f"{shown(run_file)} is damaged (no run_id)", "Restore it, or delete it")
    if resume and metrics.exists():
        for number, row in enumerate(read_text(metrics, 1 << 30).splitlines(True), 1):
            if row.endswith("\n") and not _is_row(row):  # a kill cuts the last one
                raise UserError(f"{shown(metrics)}:{number} is damaged", "Delete the line")


def _is_row(line: str) -> bool:
    try:
        return type(json.loads(line)["step"]) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def check_free(run_dir: Path, overwrite: bool = False) -> None:
    """Raises UserError where something would be overwritten unasked, or with `overwrite` what no run wrote."""
    best, is_run = run_dir / checkpoint.BEST, (run_dir / RUN_FILE).is_file()
    taken = any((run_dir / name).exists() for name in (*FILES, best.name)) or checkpoint.step_directories(run_dir)
    if taken and is_run and not overwrite:
        remedy = "Go on with it by --resume, replace it by --overwrite, or set another training.output_dir"
        raise UserError(f"{shown(run_dir)} holds a run already", remedy)
    if taken and (not is_run or (best.exists() and not (best / checkpoint.INFO_FILE).is_file())):
        what = f"{shown(run_dir)} holds files with names that a run uses, and which no run wrote"
        raise UserError(what, "Set another training.output_dir")


def clear(run_dir: Path) -> None:
    """Deletes what a run wrote, and nothing else."""
    if not (run_dir / RUN_FILE).is_file():
        return
    found = [run_dir / name for name in _LOGS]
    for pattern in (checkpoint.BEST, "checkpoint-*", "aside-*"):
        found += [info.parent for info in run_dir.glob(f"{pattern}/{checkpoint.INFO_FILE}")]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for name in FILES:
        (run_dir / name).unlink(missing_ok=True)


def saved(home: Path) -> list[tuple[int, Path]]:
    """Step and path of a run's checkpoints and of its best model."""
    paths = (*checkpoint.step_directories(home).values(), home / checkpoint.BEST)
    return [(checkpoint.read_info(path).step, path) for path in paths if (path / checkpoint.INFO_FILE).is_file()]


def find_resumed(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means: `resume` itself, or the newest of the run; None where it has none yet."""
    home = run_dir if not resume else local(resume) if is_url(resume) else Path(resume)
    found = saved(home)
    if not found and not resume:
        if not (run_dir / RUN_FILE).is_file():
            check_free(run_dir)
        log.info("no checkpoint in %s yet: starting at step 0", shown(run_dir))
        return None
    path = max(found)[1] if found else checkpoint.resolve(home)
    if not path.resolve().is_relative_to(run_dir.resolve()):
        check_free(run_dir)  # going on from another run's checkpoint
    return path


def rewind(run_dir: Path, step: int) -> None:
    """Puts checkpoints after `step` aside, and drops later rows."""
    for later, path in saved(run_dir):
        if later > step:
            free = next(n for n in itertools.count(1) if not (run_dir / f"aside-{path.name}.{n}").exists())
            aside = path.rename(run_dir / f"aside-{path.name}.{free}")
            log.info("%s is past step %d: renamed to %s", path.name, step, aside.name)
    metrics = run_dir / METRICS_FILE
    if metrics.exists():
        whole = [row for row in metrics.read_text().splitlines(True) if row.endswith("\n")]  # a kill cuts the last one
        write_text(metrics, "".join(row for row in whole if json.loads(row)["step"] <= step))


def check_shared(run_dir: Path, run_id: str, seconds: float = 20.0) -> None:
    """Raises UserError where this process does not see the run directory that the main process has taken."""
    path, end = run_dir / RUN_FILE, time.monotonic() + seconds  # a network disk may show it late
    while not (path.is_file() and run_id in path.read_text()):
        if time.monotonic() > end:
            what = f"training.output_dir {run_dir} of this process is not that of process 0"
            raise UserError(what, "Set it to a directory on a disk that all share, or to a gs:// or s3:// URL")
        time.sleep(0.1)


def take(run_dir: Path, step: int, facts: dict[str, Any]) -> str:
    """Makes the directory read as if the run had just reached `step`, and writes run.json: the facts of this start.

    Returns the run's id, the same after a resume.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.recover(run_dir)
    path = run_dir / RUN_FILE
    run_id = json.loads(path.read_text())["run_id"] if path.exists() else uuid.uuid4().hex[:8]
    write_text(path, json.dumps({"run_id": run_id} | facts, indent=1) + "\n")
    rewind(run_dir, step)
    return run_id
