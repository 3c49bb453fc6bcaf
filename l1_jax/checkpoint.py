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
# Orbax warns of what `_handler` asks for.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())

_NAME = re.compile(r"checkpoint-(\d+)")


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
    last_loss: float | None = None  # of the validation at `step`, if there was one
    l1_jax_version: str = ""


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
        raise UserError(
            f"{path} is a file, perhaps a PyTorch one, and a checkpoint is a directory",
            "Name a directory that scripts/train.py wrote, such as checkpoints/best_model",
        )
    if (path / INFO_FILE).is_file():
        return path
    steps = step_directories(path)
    if (path / BEST / INFO_FILE).is_file():
        return path / BEST
    if steps:
        return steps[max(steps)]
    near = sorted(p.name for p in path.parent.glob("*") if (p / INFO_FILE).is_file())
    raise UserError(
        f"{path} is not a checkpoint and holds none" if path.exists() else f"there is no checkpoint {path}",
        f"Checkpoints beside it: {', '.join(near)}"
        if near
        else "Train one with scripts/train.py, or name its directory",
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

    def save(self, state: TrainState, info: CheckpointInfo, *, best: bool, regular: bool) -> None:
        """Copies the state to the host and returns; the rest happens in the background.

        Args:
            best: publish it as `best_model`.
            regular: publish it as `checkpoint-<step>`.

        Raises:
            OSError: this save, or the one before, could not be written.
        """
        self.wait()
        partial = self.run_dir / f".saving-{info.step}"
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, text in (self.files | {INFO_FILE: json.dumps(dataclasses.asdict(info), indent=1)}).items():
                (partial / name).write_text(text)
        optimizer = {"step": state.step, "opt_state": state.opt_state, "loss_scale": state.loss_scale}
        self._checkpointer.save(
            (partial / "state").absolute(),
            args=ocp.args.Composite(params=ocp.args.PyTreeSave(state.params), optimizer=ocp.args.PyTreeSave(optimizer)),
        )
        self._thread = threading.Thread(target=self._finish, args=(partial, info.step, best, regular), name="save")
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

    def _finish(self, partial: Path, step: int, best: bool, regular: bool) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                self._publish(partial, step, best, regular)
        except BaseException as error:  # handed to the main thread by wait()
            self._error = error

    def _publish(self, partial: Path, step: int, best: bool, regular: bool) -> None:
        sync(partial)
        if regular:
            if best:  # the same files under two names: hard links take no space
                twin = self.run_dir / f".saving-{step}-best"
                shutil.rmtree(twin, ignore_errors=True)
                shutil.copytree(partial, twin, copy_function=_link)
            replace(partial, self.run_dir / f"checkpoint-{step}")
            partial = self.run_dir / f".saving-{step}-best"
        if best:
            replace(partial, self.run_dir / BEST)
        for old in list(step_directories(self.run_dir).values())[: -self.keep]:
            delete(old)


def recover(run_dir: Path) -> None:
    """Clears what an interrupted save, replacement or deletion left behind."""
    for old in run_dir.glob(".old-*"):
        name = run_dir / old.name.removeprefix(".old-")
        if not name.exists():  # killed between the two renames of `replace`
            old.rename(name)
    for left in (*run_dir.glob(".saving-*"), *run_dir.glob(".old-*"), *run_dir.glob(".deleting-*")):
        shutil.rmtree(left)


def replace(new: Path, name: Path) -> None:
    """Gives directory `new` the name `name`; what had it before is deleted."""
    old = name.with_name(f".old-{name.name}")
    if name.exists():
        shutil.rmtree(old, ignore_errors=True)
        name.rename(old)
    new.rename(name)
    _sync_directory(name.parent)
    shutil.rmtree(old, ignore_errors=True)


def delete(path: Path) -> None:
    """Deletes a directory so that no half of it is ever seen under its name."""
    hidden = path.with_name(f".deleting-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def set_aside(path: Path) -> Path:
    """Renames a checkpoint to a name that is no checkpoint's; nothing is lost."""
    number = 1
    while (aside := path.with_name(f"aside-{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)


def sync(directory: Path) -> None:
    """Flushes every file below `directory` to disk, so that a rename never gets there before its content."""
    for root, _, names in os.walk(directory):
        for name in names:
            with open(Path(root) / name, "rb") as file:
                os.fsync(file.fileno())
        _sync_directory(Path(root))


def restore_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The whole training state, placed as `abstract` says.

    Args:
        checkpoint: the directory.
        abstract: the state as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        UserError: a shape or type differs, or an array is missing.
    """
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state, "loss_scale": abstract.loss_scale}
    restored = _restore(checkpoint, {"params": abstract.params, "optimizer": optimizer})
    return TrainState(params=restored["params"], **restored["optimizer"])


def restore_params(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters alone, placed as `abstract` says. Raises as `restore_state`."""
    return _restore(checkpoint, {"params": abstract})["params"]


def _handler() -> ocp.CompositeCheckpointHandler:
    # A file per array: below some 8 billion parameters faster than OCDBT's merged files.
    items = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=False) for name in ("params", "optimizer")}
    return ocp.CompositeCheckpointHandler(**items)


def _restore(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    directory = (checkpoint / "state").absolute()
    with ocp.Checkpointer(_handler()) as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata
        for name, tree in abstract.items():
            _check_same(checkpoint, _flatten(saved[name].tree), _flatten(tree))
        items = {
            name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in abstract.items()
        }
        return dict(checkpointer.restore(directory, args=ocp.args.Composite(**items)).items())


def _check_same(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Orbax itself casts and pads in silence."""
    for name in sorted(saved.keys() | wanted.keys()):
        have, want = saved.get(name), wanted.get(name)
        if have != want:
            raise UserError(
                f"{checkpoint} does not fit this config: {name} is {have or 'missing'} there and {want or 'missing'} here",
                "Use the config.yaml that lies in the checkpoint",
            )


def _flatten(tree: Any) -> dict[str, str]:
    def text(key: Any) -> str:
        return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(map(text, path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
