"""Checkpoints: saved in the background by Orbax, published by rename, restored after a check of every shape.

A checkpoint is a directory that needs nothing beside it; docs/design.md lists its files.
"""

import dataclasses
import json
import logging
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from l1_jax import files
from l1_jax.cli import log
from l1_jax.errors import RunError, UserError
from l1_jax.mirror import BEST, INFO_FILE, Mirror, arrays, is_stand_in, local
from l1_jax.parallel.processes import is_main
from l1_jax.storage import is_url, shown
from l1_jax.training.state import TrainState

CONFIG_FILE, TOKENIZER_FILE = "config.yaml", "tokenizer.json"
# Orbax warns of what `_checkpointer` asks for.
_NOISE = ("Skipping merge of OCDBT", "Global object size logging disabled")
logging.getLogger("absl").addFilter(lambda record: not any(noise in record.getMessage() for noise in _NOISE))


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


def step_directories(run_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, ascending."""
    paths = [info.parent for info in run_dir.glob(f"checkpoint-*/{INFO_FILE}")]
    found = {int(m[1]): path for path in paths if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return dict(sorted(found.items()))


def read_info(checkpoint: Path) -> CheckpointInfo:
    return CheckpointInfo(**json.loads((checkpoint / INFO_FILE).read_text()))


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or a run's best model, else its newest; UserError where there is none.

    `X.pt` means X where only X exists, so that commands written for PyTorch files go on working.
    """
    path = local(str(path)) if is_url(path) else Path(path)
    if not path.exists() and path.suffix == ".pt" and path.with_suffix("").is_dir():
        log.info("%s does not exist: using %s", shown(path), shown(path.with_suffix("")))
        path = path.with_suffix("")
    if path.is_file():
        what = f"{path} is a file, perhaps a PyTorch one, and a checkpoint is a directory"
        raise UserError(what, "Name a directory that scripts/train.py wrote, such as checkpoints/best_model")
    for candidate in (path, path / BEST, *reversed(step_directories(path).values())):
        if (candidate / INFO_FILE).is_file():
            files.check_inside(path, candidate.relative_to(path).as_posix())
            return candidate
    near = ", ".join(sorted(p.name for p in path.parent.glob("*") if (p / INFO_FILE).is_file()))
    name = shown(path)
    what = f"{name} is not a checkpoint and holds none" if path.exists() else f"there is no checkpoint {name}"
    remedy = f"Beside it are: {near}" if near else "Train one with scripts/train.py, or name its directory"
    raise UserError(what, remedy)


class Saver:
    """Writes checkpoints in the background, one at a time.

    A save is written under a hidden name and renamed when whole, so a name that matches `checkpoint-*` is complete.
    Of these the newest `keep` stay. Each checkpoint carries the small files `texts`, by name. With a `mirror`, each
    process has a `run_dir` of its own, and uploads what it wrote there.
    """

    def __init__(self, run_dir: Path, keep: int, texts: dict[str, str], mirror: Mirror | None = None):
        self.run_dir, self.keep, self.texts, self.mirror = run_dir, keep, texts, mirror
        self._checkpointer = _checkpointer(ocp.AsyncCheckpointer, private=mirror is not None)
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def save(self, state: TrainState, info: CheckpointInfo, names: list[str]) -> None:
        """Copies the state to the host and returns; then it is written, and published under each of `names`."""
        self.wait()
        partial = self.run_dir / f".saving-{info.step}"
        if is_main() or self.mirror:  # Orbax lets no process write before this one is with it
            partial.mkdir(parents=True)
            for name, text in (self.texts | {INFO_FILE: json.dumps(dataclasses.asdict(info), indent=1)}).items():
                (partial / name).write_text(text, encoding="utf-8")
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in _items(state).items()}
        self._checkpointer.save((partial / "state").absolute(), args=ocp.args.Composite(**items))
        self._pending = self._pool.submit(self._publish, partial, names)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what a save in the background raised."""
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        except UserError as error:  # of the mirror
            raise RunError(error.what, error.remedy) from error

    def close(self) -> None:
        self.wait()
        if self.mirror and is_main():
            self._pending = self._pool.submit(self.mirror.send_logs)
            self.wait()
        self._checkpointer.close()
        self._pool.shutdown()

    def _publish(self, partial: Path, names: list[str]) -> None:
        self._checkpointer.wait_until_finished()
        if self.mirror:
            self.mirror.send_arrays(partial, names[0])
        else:
            _flush(partial)
        # Orbax's barrier: jax's own would use the devices, which are at work. Uploads may take long; if a process dies,
        # jax ends the others.
        ocp.multihost.get_barrier_sync_fn()(key=f"written {partial.name}", timeout_ms=3_600_000)
        if not is_main():
            if self.mirror:
                shutil.rmtree(partial)
            return
        if self.mirror:
            self.mirror.publish(partial, names[0])
        for name in names[1:]:
            twin = partial.with_name(f"{partial.name}-{name}")
            shutil.copytree(partial, twin, copy_function=_link)
            files.replace(twin, self.run_dir / name)
        files.replace(partial, self.run_dir / names[0])
        for old in list(step_directories(self.run_dir).values())[: -self.keep]:
            files.delete(old.rename(old.with_name(f".deleting-{old.name}")))  # no half is ever seen under its name
        if self.mirror:
            self.mirror.sync()


def recover(run_dir: Path) -> None:
    """Clears what an interrupted save, replacement or deletion left behind."""
    for pattern in (f".old-{BEST}", ".old-checkpoint-[0-9]*"):
        for old in run_dir.glob(pattern):
            files.recover(run_dir / old.name.removeprefix(".old-"))
    for pattern in (".saving-[0-9]*", ".deleting-checkpoint-[0-9]*"):
        for left in run_dir.glob(pattern):
            files.delete(left)


def restore_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The training state, placed as `abstract` is: `jax.ShapeDtypeStruct`s with shardings. UserError if it differs."""
    restored = _restore(checkpoint, _items(abstract))
    return TrainState(params=restored["params"], **restored["optimizer"])


def restore_params(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters alone; see `restore_state`."""
    return _restore(checkpoint, {"params": abstract})["params"]


def _items(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "optimizer": {k: v for k, v in vars(state).items() if k != "params"}}


def _checkpointer(kind: Any, private: bool) -> Any:
    """An Orbax checkpointer for a directory that all processes share, or where each has a `private` one."""
    options = ocp.options.MultiprocessingOptions(primary_host=None if private else 0)
    # A file per array rather than OCDBT's merged ones, which pay only for far larger models.
    one: Any = {"use_ocdbt": False, "multiprocessing_options": options}
    items = {name: ocp.PyTreeCheckpointHandler(**one) for name in ("params", "optimizer")}
    common = ocp.CompositeOptions(multiprocessing_options=options)
    handler = ocp.CompositeCheckpointHandler(composite_options=common, **items)
    return kind(handler, multiprocessing_options=options)


def _restore(checkpoint: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    opened = _checkpointer(ocp.Checkpointer, private=is_stand_in(checkpoint))
    with arrays(checkpoint, abstract) as directory, opened as checkpointer:
        saved = checkpointer.metadata(directory).item_metadata
        for item, tree in abstract.items():  # Orbax itself would cast and pad in silence
            have, want = _shapes(saved[item].tree), _shapes(tree)
            for name in sorted(have | want):
                there, here = have.get(name, "missing"), want.get(name, "missing")
                if there != here:
                    what = f"{shown(checkpoint)} does not fit this config: {name} is {there} there and {here} here"
                    raise UserError(what, "Use the config.yaml that lies in the checkpoint")
        placed = ocp.checkpoint_utils.construct_restore_args
        items = {item: ocp.args.PyTreeRestore(tree, placed(tree)) for item, tree in abstract.items()}
        return dict(checkpointer.restore(directory, args=ocp.args.Composite(**items)).items())


def _shapes(tree: Any) -> dict[str, str]:
    leaves, name = jax.tree_util.tree_leaves_with_path(tree), jax.tree_util.keystr
    return {name(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


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
