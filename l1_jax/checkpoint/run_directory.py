"""The run directory: whose it is, what is in it, what a resumed run keeps of it."""

import contextlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from l1_jax.checkpoint.manifest import (
    CheckpointInfo,
    Origin,
    content_digest,
    damage_error,
    find_damage,
    read_info,
)
from l1_jax.checkpoint.mirror import forget, is_stand_in, local
from l1_jax.checkpoint.names import (
    BEST,
    CONFIG_FILE,
    INFO_FILE,
    LOCK_FILE,
    LOG_DIRECTORIES,
    METRICS_FILE,
    RUN_FILE,
    RUN_FILES,
    SKIPPED_FILE,
    is_checkpoint,
    set_aside,
    step_directories,
)
from l1_jax.checkpoint.restore import find_checkpoint
from l1_jax.checkpoint.saver import recover
from l1_jax.console import log
from l1_jax.devices.processes import check_equal, gather, is_main, together
from l1_jax.errors import BusyError, RunError, UserError
from l1_jax.storage.files import check_inside, read_json, write_text
from l1_jax.storage.lock import check_unlocked, lock
from l1_jax.storage.remote import display_name, is_url


def home_of(config_file: Path, output_dir: str, *, resume: bool, overwrite: bool) -> str:
    """The run directory that a config means, where nothing but the file gives one.

    A run's own config.yaml means that run, also where its directory has another name by now than
    `output_dir`, which the file says. So does one in a checkpoint if it is to `resume`; else a new
    run has the same settings. UserError where it is not clear which run is to be replaced.
    """
    own = config_file.parent
    if resume and (own / INFO_FILE).is_file():
        own = Path(os.path.abspath(own)).parent
    if config_file.name != CONFIG_FILE or not (own / RUN_FILE).is_file():
        return output_dir

    there = output_dir.partition("://")[2] if output_dir.startswith("file://") else output_dir
    if os.path.realpath(there) == os.path.realpath(own):
        return output_dir
    # Of a run in a bucket the small files alone may have been fetched, to be looked at.
    if is_url(output_dir) and not saved(own):
        return output_dir

    what = f"{config_file} lies in the run {own}, and its training.output_dir is {output_dir}"
    if overwrite:
        raise UserError(
            f"{what}: either could be meant",
            "Set training.output_dir to the one that is to be replaced",
        )
    log.info("%s: the run directory is the former", what)
    return os.path.abspath(own) if str(own).startswith(".") else str(own)


def check_files(run_dir: Path, resume: bool) -> None:
    """Raises UserError where a link leads what a run reads, writes or deletes out of its directory,
    or where `resume` would meet a damaged file."""
    names = [
        path.name
        for pattern in ("checkpoint-*", "aside-*", ".*-*")
        for path in run_dir.glob(pattern)
    ]
    check_inside(run_dir, *RUN_FILES, *LOG_DIRECTORIES, LOCK_FILE, BEST, *names)
    for path in (run_dir / name for name in (*RUN_FILES, LOCK_FILE)):
        if path.is_dir():
            raise UserError(
                f"{display_name(path)} is a directory, and a run writes a file there", "Rename it"
            )
    run_file = run_dir / RUN_FILE
    if resume and run_file.exists():
        try:
            content = read_json(run_file, 1 << 20)
            if not isinstance(content.get("run_id"), str):
                raise UserError(f"{display_name(run_file)} is damaged (no run_id)", "")
            if not _is_origin(content.get("origin")):
                raise UserError(f"{display_name(run_file)} is damaged (origin)", "")
        except UserError as error:
            remedy = (
                "Restore it from a copy, or delete it: the account of the run's time then "
                "begins anew"
            )
            raise UserError(error.what, remedy) from None
    for log_file in (run_dir / METRICS_FILE, run_dir / SKIPPED_FILE):
        if resume and log_file.exists():
            with open(log_file, "rb") as lines:
                for number, row in enumerate(lines, 1):
                    if row.endswith(b"\n") and not _is_row(row):  # a kill cuts the last one
                        raise UserError(
                            f"{display_name(log_file)}:{number} is damaged", "Delete the line"
                        )


def _is_origin(entry: object) -> bool:
    """Whether run.json may hold this under `origin`; None is that of a run which is no branch."""
    kinds = {"path": str, "step": int, "sha256": str}
    if entry is None:
        return True
    return isinstance(entry, dict) and {name: type(x) for name, x in entry.items()} == kinds


def _is_row(line: bytes) -> bool:
    try:
        return type(json.loads(line)["step"]) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        return False


def check_free(run_dir: Path, overwrite: bool = False) -> None:
    """Raises UserError where something would be overwritten unasked, or with `overwrite` what no
    run wrote."""
    best, is_run = run_dir / BEST, (run_dir / RUN_FILE).is_file()
    taken = any((run_dir / name).exists() for name in (*RUN_FILES, best.name)) or step_directories(
        run_dir
    )
    if taken and is_run and not overwrite:
        remedy = (
            "Go on with it by `resume`, replace it by `overwrite`, or set another "
            "training.output_dir"
        )
        raise UserError(f"{display_name(run_dir)} holds a run already", remedy)
    if taken and (not is_run or (best.exists() and not is_checkpoint(best))):
        what = (
            f"{display_name(run_dir)} holds files with names that a run uses, and which no "
            "run wrote"
        )
        raise UserError(what, "Set another training.output_dir")


def stamp(run_dir: Path) -> bytes | None:
    """What another start of the run would change; None where there is no run. BusyError where one
    is under way."""
    check_unlocked(run_dir / LOCK_FILE, *_taken(run_dir))
    path = run_dir / RUN_FILE
    return path.read_bytes() if path.exists() else None


def mend(run_dir: Path, seen: bytes | None) -> float | None:
    """Gives checkpoints their names back that a kill left without, so that the newest is found.
    Every process has to call this; see `locked`, also for what it returns."""
    with together():
        if is_main() and any(run_dir.glob(".old-*")):
            with locked(run_dir, seen) as last_alive:
                recover(run_dir)
            return last_alive
    return None


@contextlib.contextmanager
def locked(run_dir: Path, seen: bytes | None) -> Iterator[float | None]:
    """Makes the directory, and keeps other runs out of it. `seen` is its `stamp` when this start
    decided what to do.

    Yields when the last start was alive, in seconds since the epoch, if it was killed. BusyError
    where another run is in it, or was since then.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / RUN_FILE
    with lock(run_dir / LOCK_FILE, *_taken(run_dir)) as last_alive:
        if (path.read_bytes() if path.exists() else None) != seen:
            raise BusyError(
                f"another run was in {display_name(run_dir)} while this one started",
                "Run the same command again",
            )
        yield last_alive


def _taken(run_dir: Path) -> tuple[str, str]:
    remedy = "Wait until it has ended, or stop it; or set another training.output_dir"
    return f"{display_name(run_dir)} is being written", remedy


def clear(run_dir: Path) -> None:
    """Deletes what a run wrote, and nothing else."""
    if not (run_dir / RUN_FILE).is_file():
        return
    found = [run_dir / name for name in LOG_DIRECTORIES]
    for pattern in (BEST, "checkpoint-*", "aside-*", "nonfinite-*"):
        found += [info.parent for info in run_dir.glob(f"{pattern}/{INFO_FILE}")]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)


def saved(home: Path) -> list[tuple[int, Path]]:
    """Step and path of a run's checkpoints and of its best model, good or damaged."""
    found, best = [*step_directories(home).items()], home / BEST
    if is_checkpoint(best):
        readable = not find_damage(best, items=())
        # Where its step is not known, it is to be the first that is looked at.
        found.append((read_info(best).step if readable else sys.maxsize, best))
        forget(best)
    return found


def find_resumed(run_dir: Path, resume: str | None) -> tuple[Path | None, list[Path]]:
    """The checkpoint that `--resume` means, and the damaged ones that were passed over; every
    process has to call this.

    It is `resume` itself, or the newest good one of that run, or without `resume` of this one.
    While this one has none, it is what this one came from; None where it came from nothing.
    UserError where there are only damaged ones.
    """
    with together():
        origin = read_origin(run_dir)
        # The command that began a branch, given again, goes on with it.
        if resume and origin and _place(resume) in (origin.path, os.path.dirname(origin.path)):
            resume = None
        home, found = _candidates(run_dir, resume)
        if resume and origin and content_digest(found[0]) == origin.sha256:
            copy, resume = found[0], None  # of the origin: the same command
            home, found = _candidates(run_dir, None)
            if not found:
                home, found = copy.parent, [copy]

        if not found and origin:
            found = [find_origin(origin)]
            home = found[0].parent
        ours = found and found[0].resolve().is_relative_to(run_dir.resolve())
        if not ours and (resume or not (run_dir / RUN_FILE).is_file()):
            check_free(
                run_dir
            )  # the run's first start, or it goes on from another run's checkpoint
    check_equal({"the checkpoints to resume": [path.name for path in found]})
    bad: dict[Path, str] = {}
    for path in found:
        if not (why := _damage(path)):
            for other, reason in bad.items():
                log.warning("%s is damaged: %s; using %s", other.name, reason, path.name)
            best = home / BEST
            # From object storage all of it would be downloaded: there its small files have been
            # looked at.
            if (
                best in found[found.index(path) + 1 :]
                and not is_stand_in(best)
                and (why := _damage(best))
            ):
                log.warning("%s is damaged: %s", best.name, why)
                bad[best] = why
            log.info("going on from %s", display_name(path))
            if ours and not (run_dir / METRICS_FILE).exists():
                log.warning(
                    "%s is not there: its rows begin anew", display_name(run_dir / METRICS_FILE)
                )
            return path, [other for other in bad if ours]
        bad[path] = why
        forget(path)
    if len(bad) == 1:
        raise damage_error(*next(iter(bad.items())))
    if bad:
        what = "; ".join(f"{path.name} is damaged: {why}" for path, why in bad.items())
        remedy = (
            "Restore one from a copy, or start again with `overwrite` or another "
            "training.output_dir"
        )
        raise UserError(f"no checkpoint of {display_name(home)} is good: {what}", remedy)
    log.info("no checkpoint in %s yet: starting at step 0", display_name(run_dir))
    return None, []


def _candidates(run_dir: Path, resume: str | None) -> tuple[Path, list[Path]]:
    """The directory that `--resume` looks in, and its checkpoints, the newest first."""
    home = run_dir if not resume else local(resume) if is_url(resume) else Path(resume)
    found = [path for _, path in sorted(saved(home), reverse=True)]
    if resume and not found:
        found = [find_checkpoint(home)]
    return home, found


def _place(path: Path | str) -> str:
    """An absolute path, or a URL: what another start, perhaps of another directory, finds it by."""
    name = str(path) if is_url(path) else display_name(Path(path))
    return name.rstrip("/") if is_url(name) else os.path.abspath(path)


def read_origin(run_dir: Path) -> Origin | None:
    """What the run in `run_dir` came from, as its run.json says; None where that is nothing."""
    path = run_dir / RUN_FILE
    entry = read_json(path, 1 << 20).get("origin") if path.is_file() else None
    return Origin(**entry) if entry else None


def origin_of(run_dir: Path, found: Path | None) -> Origin | None:
    """What a run that goes on from `found` came from: `found` itself, where that is not one of its
    own."""
    if not found:
        return None
    if found.parent.resolve() == run_dir.resolve():
        return read_origin(run_dir)

    sha256 = content_digest(found)
    assert sha256, "it was verified"
    return Origin(_place(found), read_info(found).step, sha256)


def find_origin(origin: Origin) -> Path:
    """The checkpoint that a branch came from, there or under another name beside; UserError where
    it is not there any more."""
    path = local(origin.path) if is_url(origin.path) else Path(origin.path)
    for candidate in (path, *(other for _, other in saved(path.parent))):
        if content_digest(candidate) == origin.sha256:
            return candidate

    why = "has other content now" if is_checkpoint(path) else "is not there any more"
    what = f"the run came from {display_name(path)}, step {origin.step}, which {why}"
    raise UserError(
        what, "Restore it, resume from a copy of it, or begin anew in another training.output_dir"
    )


def find_way_back(run_dir: Path, origin: Origin | None, step: int, save_steps: int) -> Path | None:
    """The last checkpoint before `step` whose number is a multiple of `save_steps`: this run's, or
    the one that it came from. None where that number is 0. RunError where that checkpoint is not
    there, or damaged.

    A checkpoint that a signal left is never taken, so that a run that was stopped does the same as
    one that was not.
    """
    if not (last := (step - 1) // save_steps * save_steps):
        return None
    path = run_dir / f"checkpoint-{last}"
    jumped = f"the loss of step {step} jumped, and"

    if origin and not is_checkpoint(path) and last <= origin.step:
        if last < origin.step:
            what = (
                f"{jumped} checkpoint-{last}, to go back to, is from before step "
                f"{origin.step}, where the run began"
            )
            remedy = (
                "Resume with training.on_spike: skip, or begin at a step that "
                "training.save_steps divides"
            )
            raise RunError(what, remedy)
        try:
            path = find_origin(origin)
        except UserError as error:
            remedy = "Restore it, or resume with training.on_spike: skip"
            raise RunError(f"{jumped} {error.what}", remedy) from error

    if why := find_damage(path):
        what = f"{jumped} {path.name}, to go back to, cannot be used: {why}"
        raise RunError(what, "Resume with training.on_spike: skip")
    return path


def _damage(path: Path) -> str | None:
    """What is damaged in a checkpoint. On a common disk each process looks at a share of it."""
    share = (0, 1) if is_stand_in(path) else (jax.process_index(), jax.process_count())
    with together():
        mine = find_damage(path, share=share)
    return next(filter(None, gather(mine or "")), None)


def missing(
    run_dir: Path, info: CheckpointInfo, found: Path | None, damaged: Collection[Path], is_due: bool
) -> list[str]:
    """The names of the state in `found`, a checkpoint of this run or not, that a kill came before,
    or damage took: its own number, where a checkpoint `is_due` at its step, and the best model."""
    if not found or found.parent.resolve() != run_dir.resolve():
        return []
    last, best = f"checkpoint-{info.step}", BEST
    there = {
        path.name for step, path in saved(run_dir) if step == info.step and path not in damaged
    }
    wanted = [last] * is_due + [best] * (info.best_step == info.step)
    return json.loads(
        gather(json.dumps([name for name in wanted if name not in there]))[0]
    )  # as process 0 sees it


def rewind(run_dir: Path, info: CheckpointInfo, *, is_best_void: bool = False) -> None:
    """Puts checkpoints after the step of `info` aside, and the best model where it is void, and
    drops later rows, and those that it will write again."""
    for later, path in saved(run_dir):
        if later > info.step:
            aside = set_aside(path, "aside")
            log.info("%s is past step %d: renamed to %s", path.name, info.step, aside.name)
        elif is_best_void and path.name == BEST:
            # It may be all that there is of the step from which the run goes on.
            last = run_dir / f"checkpoint-{info.step}"
            is_needed = later == info.step and not os.path.lexists(last)
            aside = path.rename(last) if is_needed else set_aside(path, "aside")
            log.info("%s was the best by another measure: renamed to %s", path.name, aside.name)
    for rows in (run_dir / METRICS_FILE, run_dir / SKIPPED_FILE):
        if rows.exists():
            whole = [
                row for row in rows.read_text().splitlines(True) if row.endswith("\n")
            ]  # a kill cuts the last one
            write_text(rows, "".join(row for row in whole if _is_past(json.loads(row), info)))


def _is_past(row: dict[str, Any], info: CheckpointInfo) -> bool:
    is_due = info.evaluation_due and row["step"] == info.step and "val/loss" in row
    return row["step"] <= info.step and not is_due


def check_shared(run_dir: Path, start: str, seconds: float = 20.0) -> None:
    """Raises UserError where this process does not see the run directory that the main process has
    taken."""
    path, end = run_dir / RUN_FILE, time.monotonic() + seconds  # a network disk may show it late
    while not (path.is_file() and start in path.read_text()):
        if time.monotonic() > end:
            what = f"training.output_dir {run_dir} of this process is not that of process 0"
            raise UserError(
                what, "Set it to a directory on a disk that all share, or to a gs:// or s3:// URL"
            )
        time.sleep(0.1)


def take(
    run_dir: Path,
    info: CheckpointInfo,
    facts: dict[str, Any],
    damaged: Iterable[Path] = (),
    *,
    is_best_void: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the directory read as if the run had just reached the step of `info`. Checkpoints that
    were found to be damaged are renamed, and so is a best model that is void.

    Returns what run.json is to say of this start, `facts` and two ids, and what it said of the
    starts before. `run_id` stays the same after a resume; `start` never does, and by it processes
    know whose the directory is.
    """
    recover(run_dir)
    path = run_dir / RUN_FILE
    before = json.loads(path.read_text()) if path.exists() else {}
    for bad in damaged:
        log.warning("%s renamed to %s", bad.name, set_aside(bad, "damaged").name)
    rewind(run_dir, info, is_best_void=is_best_void)
    return {
        "run_id": before.get("run_id", uuid.uuid4().hex[:8]),
        "start": uuid.uuid4().hex,
    } | facts, before
