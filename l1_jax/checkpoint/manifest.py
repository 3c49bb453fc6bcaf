"""What a checkpoint says of itself: its info, and a manifest with the SHA-256 of every file.

Damage is found by one vocabulary: `find_damage` returns what is damaged, or None; `check_*` raises.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from l1_jax.checkpoint.mirror import fetch, is_stand_in, wants
from l1_jax.checkpoint.names import ARRAYS, INFO_FILE, MANIFEST_FILE, is_checkpoint, step_of_name
from l1_jax.errors import UserError
from l1_jax.storage.files import CHANGED, find_file_damage, hash_file, read_json, read_text, why_not
from l1_jax.storage.remote import display_name

_MOST_MANIFEST_BYTES = 1 << 29
_MOST_INFO_BYTES = 1 << 20

WHOLE = (0, 1)  # the share of one process that looks at all files


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a run knows at a step, beside its arrays."""

    global_batch_size: int
    total_steps: int
    documents: str  # how the data was read: text to be evaluated is read in the same way
    data_hash: str
    tokenizer_sha256: str
    step: int = 0  # batches consumed
    tokens: int = 0  # targets trained on so far
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    suspect: bool = False  # this step's loss jumped or was not finite: no evaluation is the best
    evaluation_due: bool = False  # a signal came before the evaluation of this step was done
    unlogged: dict[str, Any] | None = None  # this step's row, if the due evaluation decides on it


@dataclasses.dataclass(frozen=True)
class Origin:
    """Another run's checkpoint: a branch goes on from it, or a run began with its weights."""

    path: str  # absolute, or a URL
    step: int
    sha256: str  # see `content_digest`


def info_text(info: CheckpointInfo) -> str:
    """The text of checkpoint.json."""
    return json.dumps(dataclasses.asdict(info), indent=1)


def read_info(checkpoint: Path) -> CheckpointInfo:
    """What a checkpoint says of itself; UserError where that cannot be read."""
    try:
        info = CheckpointInfo(**read_json(checkpoint / INFO_FILE, _MOST_INFO_BYTES))
        numbers = (info.step, info.tokens, info.global_batch_size)

        if not all(type(number) is int for number in numbers):
            raise TypeError("a number is none")
    except UserError as error:
        raise damage_error(checkpoint, f"{INFO_FILE} (unreadable: {error.what})") from error
    except (OSError, TypeError) as error:
        raise damage_error(checkpoint, f"{INFO_FILE} (unreadable: {error})") from error

    return info


def hash_files(root: Path, names: Iterable[str]) -> dict[str, Any]:
    """Size and SHA-256 of the files `names` under `root`, hashed side by side: hashlib does not
    hold the GIL."""
    paths = {name: root / name for name in names}

    with ThreadPoolExecutor() as pool:
        hashes = pool.map(hash_file, paths.values())
        return {
            name: {"bytes": path.stat().st_size, "sha256": sha256}
            for (name, path), sha256 in zip(paths.items(), hashes, strict=True)
        }


def list_files(root: Path) -> list[str]:
    """The names of all files under `root` but the manifest, sorted."""
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if name != MANIFEST_FILE)


def manifest_text(digests: dict[str, Any]) -> str:
    """The text of a manifest. There is one text for the same files, so that no byte of it can
    change unseen."""
    files = json.dumps(digests, sort_keys=True)
    whole = {"files": digests, "sha256": hashlib.sha256(files.encode()).hexdigest()}
    return json.dumps(whole, sort_keys=True, indent=1) + "\n"


def content_digest(checkpoint: Path) -> str | None:
    """The SHA-256 that stands for all files of a checkpoint, by its manifest; None where that
    cannot be read. Copies have the same, and no two saves have."""
    try:
        text = read_text(checkpoint / MANIFEST_FILE, _MOST_MANIFEST_BYTES)
        return json.loads(text)["sha256"]
    except (OSError, UserError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The digests of a manifest; ValueError, or what reading it gives, where it is damaged."""
    text = read_text(checkpoint / MANIFEST_FILE, _MOST_MANIFEST_BYTES)
    files = json.loads(text)["files"]

    if manifest_text(files) != text:
        raise ValueError

    return files


def saved_items(checkpoint: Path) -> set[str]:
    """The names of the items that a checkpoint has, as "params"; UserError where that cannot be
    read."""
    try:
        files = list(_read_manifest(checkpoint))
    except OSError as error:
        raise damage_error(checkpoint, f"{MANIFEST_FILE} ({why_not(error)})") from error
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damage_error(checkpoint, f"{MANIFEST_FILE} ({CHANGED})") from error

    paths = [name.split("/") for name in files]
    return {path[1] for path in paths if path[0] == ARRAYS and len(path) > 2}


def find_damage(
    checkpoint: Path, items: Collection[str] | None = None, share: tuple[int, int] = WHOLE
) -> str | None:
    """The first damaged file of a checkpoint, and why: `state/params/a (truncated)`.

    Args:
        checkpoint: its directory. Of one in object storage the arrays are downloaded, see
            `mirror.fetch`.
        items: of the arrays, those to look at, as "params"; None is all. The small files always
            are.
        share: (i, n) looks at the i-th of n equal shares of the files; the manifest is in each.

    Returns:
        None where all is well.
    """
    try:
        files = _read_manifest(checkpoint)
        wanted = {
            name: (files[name]["sha256"], files[name]["bytes"])
            for name in sorted(files)
            if wants(name, items)
        }
    except OSError as error:
        return f"{MANIFEST_FILE} ({why_not(error)})"
    except (UserError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST_FILE} ({CHANGED})"

    fetch(checkpoint, items)
    index, count = share
    names = list(wanted)[index::count]

    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: find_file_damage(checkpoint, name, *wanted[name]), names)
        reasons = [f"{name} ({why})" for name, why in zip(names, found, strict=True) if why]

    if reasons:
        return reasons[0]

    # Only of an info that was looked at here: in another share it may be damaged.
    return _find_wrong_name(checkpoint) if INFO_FILE in names else None


def _find_wrong_name(checkpoint: Path) -> str | None:
    """That a whole checkpoint has the name of another step."""
    named = step_of_name(checkpoint.name)

    if named is None:
        return None

    step = read_info(checkpoint).step
    return None if step == named else f"{INFO_FILE} (of step {step})"


def check_undamaged(checkpoint: Path, items: Collection[str]) -> None:
    """Raises UserError where one of the files that are read for `items` is damaged."""
    if why := find_damage(checkpoint, items):
        raise damage_error(checkpoint, why)


def damage_error(checkpoint: Path, why: str) -> UserError:
    """The error for a checkpoint that cannot be used; it names those beside it that can."""
    beside = sorted(
        path for path in checkpoint.parent.glob("*") if path != checkpoint and is_checkpoint(path)
    )
    good = [path.name for path in beside if is_stand_in(path) or not find_damage(path)]

    remedy = "Restore it from a copy of yours"
    if good:
        remedy = f"Use another one; beside it are: {', '.join(good)}"

    return UserError(f"{display_name(checkpoint)} is damaged: {why}", remedy)
