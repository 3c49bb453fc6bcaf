"""Another run's checkpoint that a run came from, remembered in run.json.

A branch goes on from it; a run with `transfer.from` began with its weights.
"""

import os
from pathlib import Path

from l1_jax.checkpoint.manifest import Origin, content_digest, read_info
from l1_jax.checkpoint.mirror import local
from l1_jax.checkpoint.names import RUN_FILE, is_checkpoint
from l1_jax.checkpoint.restore import find_checkpoint
from l1_jax.checkpoint.run_directory import ORIGIN, RUN_FILE_BYTES, TRANSFER, find_saved
from l1_jax.errors import UserError
from l1_jax.storage.files import read_json
from l1_jax.storage.remote import display_name, is_url


def read_origin(run_dir: Path, name: str = ORIGIN) -> Origin | None:
    """What the run in `run_dir` came from, as its run.json says; None where that is nothing.

    Args:
        run_dir: the run's.
        name: one of `ORIGINS`.
    """
    path = run_dir / RUN_FILE
    entry = read_json(path, RUN_FILE_BYTES).get(name) if path.is_file() else None
    return Origin(**entry) if entry else None


def origin_of(run_dir: Path, resumed: Path | None) -> Origin | None:
    """What a run that goes on from a checkpoint came from: that one, where it is none of its own.

    Args:
        run_dir: the run's.
        resumed: the checkpoint, which has been verified; None where the run begins.
    """
    if resumed is None:
        return None

    if resumed.parent.resolve() == run_dir.resolve():
        return read_origin(run_dir)

    return as_origin(resumed)


def as_origin(checkpoint: Path) -> Origin:
    """What is remembered of a checkpoint, which has been verified."""
    sha256 = content_digest(checkpoint)
    assert sha256, "it was verified"
    return Origin(_place(checkpoint), read_info(checkpoint).step, sha256)


def find_transfer(run_dir: Path, path: str | None, *, resume: bool) -> Path | None:
    """The checkpoint with whose weights a run begins; None where it begins with new ones.

    Args:
        run_dir: the run's.
        path: a checkpoint, or a run, as `transfer.from` has it.
        resume: an earlier start may have begun the run: it is the same run only with the same
            weights, also where that start left no checkpoint.

    Raises:
        UserError: there is none, or not any more the one with which the run began.
    """
    begun = read_origin(run_dir, TRANSFER) if resume else None
    if begun is None:
        return find_checkpoint(path) if path else None

    # A run's best model may be another one by now: its checkpoints are looked at too.
    if path and means_origin(path, begun):
        return find_origin(begun)

    found = find_checkpoint(path) if path else None
    if found and content_digest(found) == begun.sha256:
        return found

    what = f"the run began with the weights of {begun.path}, step {begun.step}"
    remedy = "Set it back, or begin anew with `overwrite`"
    raise UserError(f"{what}, and transfer.from is {path or 'null'}", remedy)


def is_same_transfer(run_dir: Path, path: str | None) -> bool:
    """Whether `transfer.from` means, by another path, the checkpoint with which a run began."""
    begun = read_origin(run_dir, TRANSFER)
    if begun is None or path is None:
        return False

    try:
        return means_origin(path, begun) or content_digest(find_checkpoint(path)) == begun.sha256
    except UserError:
        return False


def means_origin(path: str, origin: Origin) -> bool:
    """Whether a path that a person gives is that of the origin, or of the run that it lies in."""
    return _place(path) in (origin.path, os.path.dirname(origin.path))


def find_origin(origin: Origin) -> Path:
    """The checkpoint that a branch came from, there or under another name beside.

    Raises:
        UserError: it is not there any more.
    """
    path = local(origin.path) if is_url(origin.path) else Path(origin.path)
    beside = [other for _, other in find_saved(path.parent)]

    for candidate in (path, *beside):
        if content_digest(candidate) == origin.sha256:
            return candidate

    why = "has other content now" if is_checkpoint(path) else "is not there any more"
    what = f"the run came from {display_name(path)}, step {origin.step}, which {why}"
    remedy = "Restore it, resume from a copy of it, or begin anew in another training.output_dir"
    raise UserError(what, remedy)


def _place(path: Path | str) -> str:
    """An absolute path, or a URL: what another start, perhaps of another directory, finds it by."""
    name = str(path) if is_url(path) else display_name(Path(path))
    return name.rstrip("/") if is_url(name) else os.path.abspath(path)
