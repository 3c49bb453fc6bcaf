"""Reading a checkpoint: which one a path means, and its trees, after a check of every shape."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from l1_jax.checkpoint.mirror import arrays, fetch, is_stand_in, local
from l1_jax.checkpoint.names import ARRAYS, BEST, INFO_FILE, is_checkpoint, step_directories
from l1_jax.checkpoint.write import Trees, open_checkpointer
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.storage.files import check_inside
from l1_jax.storage.remote import display_name, is_url


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's best model, else its newest.

    `X.pt` means X where only X exists, so that commands written for PyTorch files go on working.

    Raises:
        UserError: there is none.
    """
    path = local(str(path)) if is_url(path) else Path(path)

    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        directory = path.with_suffix("")
        log.info("%s does not exist: using %s", display_name(path), display_name(directory))
        path = directory

    if path.is_file():
        what = f"{path} is a file, perhaps a PyTorch one, and a checkpoint is a directory"
        remedy = "Name a directory that scripts/train.py wrote, such as checkpoints/best_model"
        raise UserError(what, remedy)

    if (path / "tokens").is_dir() and not (path / INFO_FILE).exists():
        what = f"{display_name(path)} is prepared data and not a checkpoint"
        raise UserError(what, "Name a directory that scripts/train.py wrote")

    for candidate in (path, path / BEST, *reversed(step_directories(path).values())):
        if is_checkpoint(candidate):
            check_inside(path, candidate.relative_to(path).as_posix())
            return candidate

    raise _no_checkpoint(path)


def _no_checkpoint(path: Path) -> UserError:
    """The error for a path that means no checkpoint; it names those beside it."""
    name = display_name(path)

    # What stands for a URL lies among strangers, unless it is a part of what stands for a run.
    is_among_strangers = is_url(name) and not is_url(display_name(path.parent))
    beside = [] if is_among_strangers else list(path.parent.glob("*"))
    near = ", ".join(sorted(other.name for other in beside if (other / INFO_FILE).is_file()))

    what = f"there is no checkpoint {name}"
    if path.exists():
        what = f"{name} is not a checkpoint and holds none"

    remedy = f"Beside it are: {near}" if near else "Train one first, or name its directory"
    return UserError(what, remedy)


def restore(checkpoint: Path, abstract: Trees) -> dict[str, Any]:
    """The trees of a checkpoint, by item.

    Args:
        checkpoint: its directory, or the stand-in of one in object storage.
        abstract: the items that are wanted, as trees of `jax.ShapeDtypeStruct` with shardings: how
            they are placed.

    Raises:
        UserError: a shape, a type or a name differs.
    """
    is_private = is_stand_in(checkpoint)
    opened = open_checkpointer(ocp.Checkpointer, items=abstract, is_private=is_private)

    with arrays(checkpoint, abstract) as directory, opened as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata

        missing = [item for item in abstract if saved.get(item) is None]
        if missing:
            raise _no_item(checkpoint, missing[0])

        for item, tree in abstract.items():
            _check_same(checkpoint, saved[item].tree, tree)

        placed = ocp.checkpoint_utils.construct_restore_args
        arguments = {
            item: ocp.args.PyTreeRestore(tree, placed(tree)) for item, tree in abstract.items()
        }
        return dict(checkpointer.restore(directory, args=ocp.args.Composite(**arguments)).items())


def _no_item(checkpoint: Path, item: str) -> UserError:
    """The error for a checkpoint that no run has written, which may have weights alone."""
    what = f"{display_name(checkpoint)} has no {item}, so that no run can go on from it"
    return UserError(what, "Begin a run with its weights: name it in transfer.from")


def read_shapes(checkpoint: Path, item: str) -> dict[str, str]:
    """Type and shape of every array of an item, `float32[2, 3]`, by its dotted name.

    What is downloaded for it stays here for a `restore`, which comes next.
    """
    is_private = is_stand_in(checkpoint)
    opened = open_checkpointer(ocp.Checkpointer, items=[item], is_private=is_private)

    fetch(checkpoint, [item])
    with opened as checkpointer:
        directory = (checkpoint / ARRAYS).absolute()
        return shapes_of(checkpointer.metadata(directory).item_metadata[item].tree)


def _check_same(checkpoint: Path, there: Any, here: Any) -> None:
    """Raises UserError where the arrays of two trees differ: Orbax itself would cast and pad in
    silence."""
    have = shapes_of(there)
    want = shapes_of(here)

    for name in sorted(have | want):
        old = have.get(name, "missing")
        new = want.get(name, "missing")

        if old != new:
            what = f"{name} is {old} there and {new} here"
            remedy = "Use the config.yaml that lies in the checkpoint"
            raise UserError(f"{display_name(checkpoint)} does not fit this config: {what}", remedy)


def shapes_of(tree: Any) -> dict[str, str]:
    """Type and shape of every array of a tree, by its dotted name."""
    shapes = {}

    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        shapes[name] = f"{leaf.dtype}{list(leaf.shape)}"

    return shapes
