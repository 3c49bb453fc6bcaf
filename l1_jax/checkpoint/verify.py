"""Which checkpoints or splits are damaged: what scripts/verify.py prints."""

from pathlib import Path

from l1_jax.checkpoint.manifest import find_damage
from l1_jax.checkpoint.mirror import forget, local
from l1_jax.checkpoint.names import is_checkpoint, is_verified_name
from l1_jax.data.store import MANIFEST_BYTES, SPLITS, Prepared
from l1_jax.errors import UserError
from l1_jax.storage.files import MISSING, read_json
from l1_jax.storage.remote import Remote, is_url, scratch

_MANIFEST = "manifest.json"


def verify_path(path: str) -> dict[str, str | None]:
    """Looks for damage. Changes nothing.

    Args:
        path: of a run, a checkpoint, or prepared data.

    Returns:
        The damage, `FILE (why)` or None, by the checkpoints of a run, or of one checkpoint, or by
        the parts of prepared data.

    Raises:
        UserError: `path` is none of these.
    """
    directory = _fetch(path) if is_url(path) else Path(path)
    if (directory / "tokens").is_dir() or _is_prepared(directory):
        return _verify_prepared(directory)

    if not directory.exists():
        raise UserError(f"{path} does not exist", "Give a run, a checkpoint, or prepared data")

    checkpoints = _find_checkpoints(directory)
    if not checkpoints:
        what = f"{path} is neither a run with checkpoints, nor a checkpoint, nor prepared data"
        remedy = "Give a directory that scripts/train.py or scripts/prepare_data.py wrote"
        raise UserError(what, remedy)

    damages = {}
    for checkpoint in checkpoints:
        damages[checkpoint.name] = _find_link(directory, checkpoint) or find_damage(checkpoint)
        forget(checkpoint)
    return damages


def _find_checkpoints(directory: Path) -> list[Path]:
    if is_checkpoint(directory):
        return [directory]
    if not directory.is_dir():
        return []

    inside = sorted(directory.iterdir())
    return [entry for entry in inside if entry.is_dir() and is_verified_name(entry.name)]


def _find_link(directory: Path, checkpoint: Path) -> str | None:
    """That a checkpoint lies outside of its directory; None where it does not."""
    if checkpoint == directory or checkpoint.resolve().is_relative_to(directory.resolve()):
        return None
    return "a link that leaves its directory"


def _fetch(url: str) -> Path:
    """Prepared data as it is there, not as it is in the cache.

    Or the stand-in of a run or checkpoint.
    """
    remote = Remote(url)
    if "tokens" not in remote.entries():
        return local(url)

    home = scratch(url)
    remote.download(home, remote.files())
    return home


def _is_prepared(directory: Path) -> bool:
    """Whether it was prepared, for its tokens may be gone."""
    try:
        return "hash_chain" in read_json(directory / _MANIFEST, MANIFEST_BYTES)
    except (OSError, UserError):
        return False


def _verify_prepared(directory: Path) -> dict[str, str | None]:
    try:
        prepared = Prepared.open(directory)
    except UserError as error:
        is_there = (directory / _MANIFEST).exists()
        return {"manifest": error.what if is_there else f"{_MANIFEST} ({MISSING})"}

    damages = {}
    for split in SPLITS:
        damages[split] = prepared.find_damage([f"{split}.txt", f"tokens/{split}.bin"])
    damages["tokenizer"] = prepared.find_damage(["tokenizer.json"])
    return damages
