"""Checkpoints: saved in the background by Orbax, published by rename, restored after a check of every shape.

A checkpoint is a directory that needs nothing beside it:

    checkpoint-1000/
      state/params/      the model (Orbax)
      state/optimizer/   optimizer state, step and loss scale (Orbax)
      config.yaml        the resolved config
      tokenizer.json     the tokenizer
      checkpoint.json    `CheckpointInfo`
"""

import dataclasses
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from l1_jax.cli import log
from l1_jax.errors import UserError
from l1_jax.training.state import TrainState

INFO_FILE, CONFIG_FILE, TOKENIZER_FILE, BEST = "checkpoint.json", "config.yaml", "tokenizer.json", "best_model"
_NAME = re.compile(r"checkpoint-(\d+)")
# Orbax warns of what `_handler` asks for.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())


@dataclasses.dataclass(frozen=True)
class CheckpointInfo:
    """What a run knows at a step, beside its arrays."""

    step: int  # batches consumed
    tokens: int  # targets trained on so far
    global_batch_size: int
    total_steps: int
    documents: str  # how the data was read, `line` or `file`: text to be evaluated is read in the same way
    data_hash: str
    tokenizer_sha256: str
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


def step_directories(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, ascending."""
    found = {int(m[1]): path for path in run_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if (found[step] / INFO_FILE).is_file()}


def read_info(checkpoint: Path) -> CheckpointInfo:
    return CheckpointInfo(**json.loads((checkpoint / INFO_FILE).read_text()))


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's best model, else its newest.

    `X.pt` means X where only X exists, so that commands written for PyTorch files go on working.

    Raises:
        UserError: there is none, or it is a PyTorch file.
    """
    path = Path(path)
    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        log.info("%s does not exist: using %s", path, path.with_suffix(""))
        path = path.with_suffix("")
    if path.is_file():
        what = f"{path} is a file, perhaps a PyTorch one, and a checkpoint is a directory"
        raise UserError(what, "Name a directory that scripts/train.py wrote, such as checkpoints/best_model")
    for candidate in (path, path / BEST, *reversed(step_directories(path).values())):
        if (candidate / INFO_FILE).is_file():
            return candidate
    near = ", ".join(sorted(p.name for p in path.parent.glob("*") if (p / INFO_FILE).is_file()))
    what = f"{path} is not a checkpoint and holds none" if path.exists() else f"there is no checkpoint {path}"
    raise UserError(
        what, f"Beside it are: {near}" if near else "Train one with scripts/train.py, or name its directory"
    )


class Saver:
    """Writes checkpoints in the background, one at a time.

    A save is written under a hidden name and renamed when whole, so a name that matches `checkpoint-*` is complete.

    Args:
        run_dir: where checkpoints appear.
        keep: how many of the newest are kept.
        files: small files that each checkpoint carries, by name.
    """

    def __init__(self, run_dir: Path, keep: int, files: dict[str, str]):
        self.run_dir, self.keep, self.files = run_dir, keep, files
        self._checkpointer = ocp.AsyncCheckpointer(_handler())
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, info: CheckpointInfo, names: list[str]) -> None:
        """Copies the state to the host and returns; then it is written, and published under each of `names`.

        Raises:
            OSError: this save, or the one before, could not be written.
        """
        self.wait()
        partial = self.run_dir / f".saving-{info.step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in (self.files | {INFO_FILE: json.dumps(dataclasses.asdict(info), indent=1)}).items():
            (partial / name).write_text(text, encoding="utf-8")
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}
        self._checkpointer.save((partial / "state").absolute(), args=ocp.args.Composite(**items))
        self._thread = threading.Thread(target=self._finish, args=(partial, names), name="save")
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written; raises what a save in the background raised."""
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()

    def _finish(self, partial: Path, names: list[str]) -> None:
        try:
            self._checkpointer.wait_until_finished()
            _flush(partial)
            for name in names[1:]:
                twin = partial.with_name(f"{partial.name}-{name}")
                shutil.rmtree(twin, ignore_errors=True)
                shutil.copytree(partial, twin, copy_function=_link)
                replace(twin, self.run_dir / name)
            replace(partial, self.run_dir / names[0])
            for old in list(step_directories(self.run_dir).values())[: -self.keep]:
                hidden = old.rename(old.with_name(f".deleting-{old.name}"))  # no half of it is ever seen under its name
                shutil.rmtree(hidden)
        except BaseException as error:  # raised by wait(), in the main thread
            self._error = error


def replace(new: Path, name: Path) -> None:
    """Gives directory `new` the name `name`; what had it before is deleted."""
    old = name.with_name(f".old-{name.name}")
    if name.exists():
        shutil.rmtree(old, ignore_errors=True)
        name.rename(old)
    new.rename(name)
    shutil.rmtree(old, ignore_errors=True)


def recover(run_dir: Path) -> None:
    """Clears what an interrupted save, replacement or deletion left behind."""
    for old in run_dir.glob(".old-*"):
        name = run_dir / old.name.removeprefix(".old-")
        if not name.exists():  # killed between the two renames of `replace`
            old.rename(name)
    for pattern in (".saving-*", ".old-*", ".deleting-*"):
        for left in run_dir.glob(pattern):
            shutil.rmtree(left)


def restore_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The whole training state.

    Args:
        checkpoint: the directory.
        abstract: the state as `jax.ShapeDtypeStruct`s with shardings, where the arrays are to lie.

    Raises:
        UserError: a shape or type differs, or an array is missing.
    """
    restored = _restore(checkpoint, _items(abstract))
    return TrainState(params=restored["params"], **restored["optimizer"])


def restore_params(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters alone; see `restore_state`."""
    return _restore(checkpoint, {"params": abstract})["params"]


def _items(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}
    return {"params": state.params, "optimizer": optimizer}


def _handler() -> ocp.CompositeCheckpointHandler:
    # A file per array rather than OCDBT's merged ones, which pay only for far larger models.
    items = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in ("params", "optimizer")}
    return ocp.CompositeCheckpointHandler(**items)


def _restore(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    directory = (checkpoint / "state").absolute()
    with ocp.Checkpointer(_handler()) as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata
        for item, tree in abstract.items():  # Orbax itself would cast and pad in silence
            have, want = _shapes(saved[item].tree), _shapes(tree)
            for name in sorted(have.keys() | want.keys()):
                if have.get(name) != want.get(name):
                    there, here = have.get(name, "missing"), want.get(name, "missing")
                    what = f"{checkpoint} does not fit this config: {name} is {there} there and {here} here"
                    raise UserError(what, "Use the config.yaml that lies in the checkpoint")
        items = {
            item: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            for item, tree in abstract.items()
        }
        return dict(checkpointer.restore(directory, args=ocp.args.Composite(**items)).items())


def _shapes(tree: Any) -> dict[str, str]:
    def text(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(text, path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _flush(directory: Path) -> None:
    """Puts every file on disk, so that a rename never gets there before its content."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)  # the same file under two names takes no space
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
