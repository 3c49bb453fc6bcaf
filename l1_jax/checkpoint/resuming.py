"""What a run goes on from: the checkpoint that `resume` means, and the one to go back to."""

import os
from pathlib import Path
from typing import NamedTuple

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
    METRICS_FILE,
    RUN_FILE,
    is_checkpoint,
    step_name,
)
from l1_jax.checkpoint.origin import find_origin, means_origin, read_origin
from l1_jax.checkpoint.restore import find_checkpoint
from l1_jax.checkpoint.run_directory import RunDirectory, find_saved
from l1_jax.console import log
from l1_jax.devices.processes import check_equal, from_main, gather, together
from l1_jax.errors import RunError, UserError
from l1_jax.storage.remote import display_name, is_url


class Resumed(NamedTuple):
    """What a run goes on from."""

    # None where the run begins.
    path: Path | None = None

    # Checkpoints of this run that were found to be damaged on the way.
    damaged: tuple[Path, ...] = ()


class _Candidates(NamedTuple):
    """Checkpoints that a run may go on from, the newest first, and where they were found."""

    run_dir: Path
    found: list[Path]


def home_of(config_file: Path, output_dir: str, *, resume: bool, overwrite: bool) -> str:
    """The run directory that a config means, where nothing but the file gives one.

    A run's own config.yaml means that run, also where its directory has another name by now than
    `output_dir`, which the file says. So does one in a checkpoint if it is to `resume`; else a new
    run has the same settings.

    Raises:
        UserError: it is not clear which run is to be replaced.
    """
    own = config_file.parent
    if resume and (own / INFO_FILE).is_file():
        own = Path(os.path.abspath(own)).parent

    if config_file.name != CONFIG_FILE or not (own / RUN_FILE).is_file():
        return output_dir

    if os.path.realpath(output_dir.removeprefix("file://")) == os.path.realpath(own):
        return output_dir

    # Of a run in a bucket the small files alone may have been fetched, to be looked at.
    if is_url(output_dir) and not find_saved(own):
        return output_dir

    what = f"{config_file} lies in the run {own}, and its training.output_dir is {output_dir}"
    if overwrite:
        remedy = "Set training.output_dir to the one that is to be replaced"
        raise UserError(f"{what}: either could be meant", remedy)

    log.info("%s: the run directory is the former", what)
    return os.path.abspath(own) if str(own).startswith(".") else str(own)


def find_resumed(home: RunDirectory, resume_from: str | None) -> Resumed:
    """The checkpoint that a run goes on from. Every process has to call this.

    Args:
        home: where the run is written.
        resume_from: a checkpoint, or a run, of which the newest good one is meant; None is this
            run. While this run has none, what it came from is meant.

    Raises:
        UserError: there are only damaged ones.
    """
    with together():
        candidates = _find_candidates(home, resume_from)

    names = [path.name for path in candidates.found]
    check_equal({"the checkpoints to resume": names})

    bad: dict[Path, str] = {}
    for path in candidates.found:
        why = find_damage_together(path)

        if why is None:
            bad |= _find_damaged_best(candidates, chosen=path)
            return _announce(home, candidates, chosen=path, bad=bad)

        bad[path] = why
        forget(path)

    if bad:
        raise _none_is_good(candidates.run_dir, bad)

    log.info("no checkpoint in %s yet: starting at step 0", display_name(home.path))
    return Resumed()


def _find_candidates(home: RunDirectory, resume_from: str | None) -> _Candidates:
    """The checkpoints that a run may go on from, by what it came from and what is asked for."""
    origin = read_origin(home.path)

    # Another run's checkpoint is asked for; unless the command that began a branch is given again.
    if resume_from and not (origin and means_origin(resume_from, origin)):
        asked = _look_in(local(resume_from) if is_url(resume_from) else Path(resume_from))
        if not asked.found:
            asked = asked._replace(found=[find_checkpoint(asked.run_dir)])

        newest = asked.found[0]
        is_copy_of_origin = origin is not None and content_digest(newest) == origin.sha256
        if not is_copy_of_origin:
            return _check_new(home, asked)

        own = _look_in(home.path)
        return own if own.found else _Candidates(newest.parent, [newest])

    own = _look_in(home.path)
    if own.found:
        return own

    if origin:
        path = find_origin(origin)
        return _Candidates(path.parent, [path])

    return own if home.run_file.is_file() else _check_new(home, own)


def _check_new(home: RunDirectory, candidates: _Candidates) -> _Candidates:
    """The candidates of a run's first start; UserError where something is in its way."""
    if not _are_ours(home, candidates):
        home.check_free()

    return candidates


def _look_in(run_dir: Path) -> _Candidates:
    found = sorted(find_saved(run_dir), reverse=True)
    return _Candidates(run_dir, [path for _, path in found])


def _are_ours(home: RunDirectory, candidates: _Candidates) -> bool:
    if not candidates.found:
        return False

    return candidates.found[0].resolve().is_relative_to(home.path.resolve())


def _find_damaged_best(candidates: _Candidates, chosen: Path) -> dict[Path, str]:
    """The best model and its damage, where it is of an earlier step than what is chosen, and so has
    not been looked at on the way."""
    best = candidates.run_dir / BEST
    rest = candidates.found[candidates.found.index(chosen) + 1 :]

    # From object storage all of it would be downloaded: there its small files have been looked at.
    if best not in rest or is_stand_in(best):
        return {}

    why = find_damage_together(best)
    return {} if why is None else {best: why}


def _announce(
    home: RunDirectory, candidates: _Candidates, chosen: Path, bad: dict[Path, str]
) -> Resumed:
    """Says what the run goes on from, and what was found to be damaged."""
    passed = candidates.found[: candidates.found.index(chosen)]

    for path, why in bad.items():
        using = f"; using {chosen.name}" if path in passed else ""
        log.warning("%s is damaged: %s%s", path.name, why, using)

    log.info("going on from %s, step %d", display_name(chosen), read_info(chosen).step)

    if not _are_ours(home, candidates):
        return Resumed(chosen)

    metrics = home.path / METRICS_FILE
    if not metrics.exists():
        log.warning("%s is not there: its rows begin anew", display_name(metrics))

    return Resumed(chosen, tuple(bad))


def _none_is_good(run_dir: Path, bad: dict[Path, str]) -> UserError:
    if len(bad) == 1:
        return damage_error(*next(iter(bad.items())))

    what = "; ".join(f"{path.name} is damaged: {why}" for path, why in bad.items())
    remedy = "Restore one from a copy, or start again with `overwrite` or another"
    remedy += " training.output_dir"
    return UserError(f"no checkpoint of {display_name(run_dir)} is good: {what}", remedy)


def find_damage_together(path: Path) -> str | None:
    """What is damaged in a checkpoint. On a common disk each process looks at a share of it: every
    process has to call this."""
    share = (jax.process_index(), jax.process_count())
    if is_stand_in(path):
        share = (0, 1)

    with together():
        mine = find_damage(path, share=share)

    found = gather(mine or "")
    return next(filter(None, found), None)


def find_way_back(run_dir: Path, origin: Origin | None, step: int, save_steps: int) -> Path | None:
    """The last checkpoint before `step` whose number is a multiple of `save_steps`: this run's, or
    the one that it came from. None where that number is 0.

    A checkpoint that a signal left is never taken, so that a run that was stopped does the same as
    one that was not.

    Raises:
        RunError: that checkpoint is not there, or damaged.
    """
    last = (step - 1) // save_steps * save_steps
    if last == 0:
        return None

    path = run_dir / step_name(last)
    jumped = f"the loss of step {step} jumped, and"

    if origin and not is_checkpoint(path) and last <= origin.step:
        if last < origin.step:
            what = f"{jumped} {path.name}, to go back to, is from before step {origin.step}"
            remedy = "Resume with training.on_spike: skip"
            remedy += ", or begin at a step that training.save_steps divides"
            raise RunError(f"{what}, where the run began", remedy)

        try:
            path = find_origin(origin)
        except UserError as error:
            remedy = "Restore it, or resume with training.on_spike: skip"
            raise RunError(f"{jumped} {error.what}", remedy) from error

    why = find_damage(path)
    if why is not None:
        what = f"{jumped} {path.name}, to go back to, cannot be used: {why}"
        raise RunError(what, "Resume with training.on_spike: skip")

    return path


def find_missing(
    run_dir: Path, info: CheckpointInfo, resumed: Resumed, *, is_due: bool
) -> list[str]:
    """The names that the state of a resumed checkpoint should have in its run and has not, for a
    kill came before, or damage took them.

    Args:
        run_dir: the run's; a checkpoint of another one has none to have.
        info: of the checkpoint.
        resumed: the checkpoint, and the damaged ones.
        is_due: a checkpoint of its own number is due at its step. So is the best model, where it
            is the best one.
    """
    if resumed.path is None or resumed.path.parent.resolve() != run_dir.resolve():
        return []

    wanted = [step_name(info.step)] if is_due else []
    if info.best_step == info.step:
        wanted.append(BEST)

    saved = [path for step, path in find_saved(run_dir) if step == info.step]
    there = {path.name for path in saved if path not in resumed.damaged}

    return from_main([name for name in wanted if name not in there])
