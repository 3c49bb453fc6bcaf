"""Which checkpoints or splits are damaged: what scripts/verify.py prints."""

import re
from pathlib import Path

from l1_jax.checkpoint.manifest import find_damage
from l1_jax.checkpoint.mirror import forget, local
from l1_jax.checkpoint.names import BEST, BUNDLE, is_checkpoint
from l1_jax.data.store import SPLITS, Prepared
from l1_jax.errors import UserError
from l1_jax.storage.files import MISSING, read_json
from l1_jax.storage.remote import Remote, is_url, scratch


def verify_path(path: str) -> dict[str, str | None]:
    """The damage, `FILE (why)` or None, by the checkpoints of a run, or of one checkpoint, or by
    the parts of prepared data. Changes nothing. UserError where `path` is none of these."""
    directory = _fetch(path) if is_url(path) else Path(path)
    if (directory / "tokens").is_dir() or _is_prepared(directory):
        return _verify_prepared(directory)
    if is_checkpoint(directory):
        found = [directory]
    else:
        inside = sorted(directory.iterdir()) if directory.is_dir() else []
        ours = re.compile(rf"(aside-)?(checkpoint-\d+|{BUNDLE}-\d+|{BEST})(\.\d+)?")
        found = [entry for entry in inside if entry.is_dir() and ours.fullmatch(entry.name)]
    if not found:
        what = f"{path} is neither a run with checkpoints, nor a checkpoint, nor prepared data"
        raise UserError(
            what, "Give a directory that scripts/train.py or scripts/prepare_data.py wrote"
        )
    damages = {}
    for one in found:
        damages[one.name] = _link(directory, one) or find_damage(one)
        forget(one)
    return damages


def _link(directory: Path, one: Path) -> str | None:
    is_inside = one == directory or one.resolve().is_relative_to(directory.resolve())
    return None if is_inside else "a link that leaves its directory"


def _fetch(url: str) -> Path:
    """Prepared data as it is there, not as it is in the cache; or the stand-in of a run or
    checkpoint."""
    remote = Remote(url)
    if "tokens" not in remote.entries():
        return local(url)
    home = scratch(url)
    remote.download(home, remote.files())
    return home


def _is_prepared(directory: Path) -> bool:
    """Whether it was prepared, for its tokens may be gone."""
    try:
        return "hash_chain" in read_json(directory / "manifest.json", 1 << 29)
    except (OSError, UserError):
        return False


def _verify_prepared(directory: Path) -> dict[str, str | None]:
    parts = {split: [f"{split}.txt", f"tokens/{split}.bin"] for split in SPLITS} | {
        "tokenizer": ["tokenizer.json"]
    }
    try:
        prepared = Prepared.open(directory)
    except UserError as error:
        return {
            "manifest": error.what
            if (directory / "manifest.json").exists()
            else f"manifest.json ({MISSING})"
        }
    return {name: prepared.damage(files) for name, files in parts.items()}
