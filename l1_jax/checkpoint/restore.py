"""Checkpoints: what they are, which one is meant, and how one is restored, after a check of every shape.

A checkpoint is a directory that needs nothing beside it; docs/design.md lists its files.
"""

import dataclasses
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from l1_jax.checkpoint.manifest import find_damaged_file
from l1_jax.checkpoint.mirror import arrays, is_stand_in, local
from l1_jax.checkpoint.names import BEST, INFO_FILE, is_checkpoint, step_directories
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.storage import files
from l1_jax.storage.remote import display_name, is_url
from l1_jax.training.state import TrainState

# Orbax warns of what `open_checkpointer` asks for, and prints the traceback of every error that it also raises.
_NOISE = (
    "Skipping merge of OCDBT", "Global object size logging disabled", "Handler Commit operations or the Commit",
    "_SignalingThread.run() raised an exception", "exception was never retrieved",
)  # fmt: skip
_print_unraisable = sys.unraisablehook


def _unraisable(event: Any) -> None:
    if str(event.exc_value) != "Event loop is closed":  # of each array that was on its way when a save failed
        _print_unraisable(event)


sys.unraisablehook = _unraisable


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(lambda record: not any(noise in record.getMessage() for noise in _NOISE))


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a run knows at a step, beside its arrays."""

    global_batch_size: int
    total_steps: int
    documents: str  # how the data was read, `line` or `file`: text to be evaluated is read in the same way
    data_hash: str
    tokenizer_sha256: str
    step: int = 0  # batches consumed
    tokens: int = 0  # targets trained on so far
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    suspect: bool = False  # the loss of this step jumped or was not finite: no evaluation here is the best
    evaluation_due: bool = False  # a signal came before the evaluation of this step was done
    unlogged: dict[str, Any] | None = None  # this step's row, if the evaluation that is due decides on it


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint of another run that a run, a branch of it, goes on from."""

    path: str  # absolute, or a URL
    step: int
    sha256: str  # see `integrity.content_digest`


def read_info(checkpoint: Path) -> CheckpointInfo:
    """What a checkpoint says of itself; UserError where that cannot be read."""
    try:
        info = CheckpointInfo(**files.read_json(checkpoint / INFO_FILE, 1 << 20))
        if not all(type(number) is int for number in (info.step, info.tokens, info.global_batch_size)):
            raise TypeError("a number is none")
    except UserError as error:
        raise damage_error(checkpoint, f"{INFO_FILE} (unreadable: {error.what})") from error
    except (OSError, TypeError) as error:
        raise damage_error(checkpoint, f"{INFO_FILE} (unreadable: {error})") from error
    return info


def find_damage(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What `verify` says of a whole checkpoint, or that it has the name of another step."""
    if why := find_damaged_file(checkpoint, share=share):
        return why
    step = read_info(checkpoint).step
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return f"{INFO_FILE} (of step {step})" if named and int(named[1]) != step else None


def check_items(checkpoint: Path, items: tuple[str, ...]) -> None:
    """Raises UserError where one of the files that are read for `items` is damaged; see `verify`."""
    if why := find_damaged_file(checkpoint, items):
        raise damage_error(checkpoint, why)


def damage_error(checkpoint: Path, why: str) -> UserError:
    """The error for a checkpoint that cannot be used; it names those beside it that can."""
    beside = sorted(p for p in checkpoint.parent.glob("*") if p != checkpoint and is_checkpoint(p))
    good = [p.name for p in beside if is_stand_in(p) or not find_damaged_file(p)]
    remedy = f"Use another one; beside it are: {', '.join(good)}" if good else "Restore it from a copy of yours"
    return UserError(f"{display_name(checkpoint)} is damaged: {why}", remedy)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's best model, else its newest; UserError where there is none.

    `X.pt` means X where only X exists, so that commands written for PyTorch files go on working.
    """
    path = local(str(path)) if is_url(path) else Path(path)
    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        log.info("%s does not exist: using %s", display_name(path), display_name(path.with_suffix("")))
        path = path.with_suffix("")
    if path.is_file():
        what = f"{path} is a file, perhaps a PyTorch one, and a checkpoint is a directory"
        raise UserError(what, "Name a directory that scripts/train.py wrote, such as checkpoints/best_model")
    for candidate in (path, path / BEST, *reversed(step_directories(path).values())):
        if is_checkpoint(candidate):
            files.check_inside(path, candidate.relative_to(path).as_posix())
            return candidate
    name = display_name(path)
    # What stands for a URL lies among strangers, unless it is a part of what stands for a run.
    beside = [] if is_url(name) and not is_url(display_name(path.parent)) else path.parent.glob("*")
    near = ", ".join(sorted(p.name for p in beside if (p / INFO_FILE).is_file()))
    what = f"{name} is not a checkpoint and holds none" if path.exists() else f"there is no checkpoint {name}"
    remedy = f"Beside it are: {near}" if near else "Train one with scripts/train.py, or name its directory"
    raise UserError(what, remedy)


def restore_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The training state, placed as `abstract` is: `jax.ShapeDtypeStruct`s with shardings. UserError if it differs."""
    restored = _restore(checkpoint, items_of(abstract))
    return TrainState(params=restored["params"], **restored["optimizer"])


def restore_params(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters alone; see `restore_state`."""
    return _restore(checkpoint, {"params": abstract})["params"]


def items_of(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "optimizer": {k: v for k, v in vars(state).items() if k != "params"}}


def open_checkpointer(kind: Any, private: bool, barrier: Callable[..., None] | None = None) -> Any:
    """An Orbax checkpointer for a directory that all processes share, or where each has a `private` one. Those that
    write in the background wait for one another in `barrier`."""
    options = ocp.options.MultiprocessingOptions(primary_host=None if private else 0)
    # A file per array rather than OCDBT's merged ones, which pay only for far larger models.
    # Compressed by 7 %, a save takes twice the processor time from the training beside it: only for what is sent.
    one: Any = {"use_ocdbt": False, "use_compression": private, "multiprocessing_options": options}
    items = {name: ocp.PyTreeCheckpointHandler(**one) for name in ("params", "optimizer")}
    common = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=common, **items)
    if kind is ocp.Checkpointer:
        return kind(handler, multiprocessing_options=options)
    # Where a directory cannot be made in the background, Orbax leaves threads that wait for it for ten minutes.
    alone = ocp.options.AsyncOptions(create_directories_asynchronously=False, barrier_sync_fn=barrier)
    return kind(handler, multiprocessing_options=options, async_options=alone)


def _restore(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    opened = open_checkpointer(ocp.Checkpointer, private=is_stand_in(checkpoint))
    with arrays(checkpoint, abstract) as directory, opened as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata
        for item, tree in abstract.items():  # Orbax itself would cast and pad in silence
            have, want = _shapes(saved[item].tree), _shapes(tree)
            for name in sorted(have | want):
                there, here = have.get(name, "missing"), want.get(name, "missing")
                if there != here:
                    what = (
                        f"{display_name(checkpoint)} does not fit this config: {name} is {there} there and {here} here"
                    )
                    raise UserError(what, "Use the config.yaml that lies in the checkpoint")
        placed = ocp.checkpoint_utils.construct_restore_args
        items = {item: ocp.args.PyTreeRestore(tree, placed(tree)) for item, tree in abstract.items()}
        return dict(checkpointer.restore(directory, args=ocp.args.Composite(**items)).items())


def _shapes(tree: Any) -> dict[str, str]:
    leaves, name = jax.tree_util.tree_leaves_with_path(tree), jax.tree_util.keystr
    return {name(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
