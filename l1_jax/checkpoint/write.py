"""Writing a checkpoint: trees and texts under a hidden name, a manifest, then the rename.

The shelf does not know what lies on it: it takes named trees of arrays, and texts.
"""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from l1_jax.checkpoint.manifest import (
    CheckpointInfo,
    hash_files,
    info_text,
    list_files,
    manifest_text,
)
from l1_jax.checkpoint.names import (
    ARRAYS,
    DAMAGED,
    INFO_FILE,
    MANIFEST_FILE,
    is_checkpoint,
    saving_name,
    set_aside,
)
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.storage import files

Trees = Mapping[str, Any]  # nested dicts of arrays, by the name of the item that holds them

# Orbax warns of what `open_checkpointer` asks for, and prints the traceback of every error that it
# also raises.
_NOISE = (
    "Skipping merge of OCDBT",
    "was found in the checkpoint, but could not be restored",  # nobody asked for it
    "Global object size logging disabled",
    "Handler Commit operations or the Commit",
    "_SignalingThread.run() raised an exception",
    "exception was never retrieved",
)
_print_unraisable = sys.unraisablehook


def _unraisable(event: Any) -> None:
    # Of each array that was on its way when a save failed.
    if str(event.exc_value) != "Event loop is closed":
        _print_unraisable(event)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in _NOISE)


sys.unraisablehook = _unraisable
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_worth_saying)


def write(directory: Path, trees: Trees, texts: Mapping[str, str], info: CheckpointInfo) -> None:
    """Writes a checkpoint outside of a run, whole or not at all. Used by one process.

    Args:
        directory: what it is to be called; nothing may be there.
        trees: arrays by item, as {"params": {...}}.
        texts: the small files beside them, by name.
        info: what it says of itself.

    Raises:
        UserError: the name is taken.
    """
    if os.path.lexists(directory):
        raise UserError(f"{directory} is in the way of a checkpoint", "Choose another directory")

    partial = directory.with_name(saving_name(directory.name))
    files.delete(partial)

    try:
        write_texts(partial, {**texts, INFO_FILE: info_text(info)})

        with open_checkpointer(ocp.Checkpointer, items=trees, is_private=True) as checkpointer:
            checkpointer.save((partial / ARRAYS).absolute(), args=save_arguments(trees))

        write_manifest(partial, hash_files(partial, list_files(partial)))
        flush(partial)
        give_names(partial, [directory])
    finally:
        files.delete(partial)


def open_checkpointer(
    kind: Any,
    *,
    items: Collection[str],
    is_private: bool,
    barrier: Callable[..., None] | None = None,
) -> Any:
    """An Orbax checkpointer, `ocp.Checkpointer` or `ocp.AsyncCheckpointer`.

    Args:
        items: the names of the trees.
        is_private: each process has a directory of its own, rather than one that all share.
        barrier: in which those that write in the background wait for one another.
    """
    options = ocp.options.MultiprocessingOptions(primary_host=None if is_private else 0)

    # A file per array rather than OCDBT's merged ones, which pay only for far larger models.
    # Compressed by 7 %, a save takes twice the processor time from the training beside it: only
    # for what is sent.
    tree_options: dict[str, Any] = {
        "use_ocdbt": False,
        "use_compression": is_private,
        "multiprocessing_options": options,
    }
    handlers = {name: ocp.PyTreeCheckpointHandler(**tree_options) for name in items}
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options), **handlers
    )

    if kind is ocp.Checkpointer:
        return kind(handler, multiprocessing_options=options)

    # Where a directory cannot be made in the background, Orbax leaves threads that wait for it for
    # ten minutes.
    in_background = ocp.options.AsyncOptions(
        create_directories_asynchronously=False, barrier_sync_fn=barrier
    )
    return kind(handler, multiprocessing_options=options, async_options=in_background)


def save_arguments(trees: Trees) -> Any:
    """What Orbax wants to be told of the trees."""
    return ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()})


def copy_to_hold(trees: Trees) -> Trees:
    """What Orbax may hold for as long as it writes: on CPU a copy, else the trees themselves.

    Orbax makes none where the arrays lie in the host's memory, and the next step, which is to reuse
    that, would wait for the last byte on disk (benchmarks/RESULTS.md).
    """
    leaves = jax.tree.leaves(trees)

    if leaves[0].addressable_shards[0].device.platform != "cpu":
        return trees

    shardings = jax.tree.map(lambda leaf: leaf.sharding, trees)

    try:
        return jax.block_until_ready(jax.jit(_copy, out_shardings=shardings)(trees))
    except jax.errors.JaxRuntimeError as error:
        message = "no memory for a copy of the state (%s): the next step waits for the save"
        log.warning(message, str(error).split(":")[0])
        return trees


def _copy(trees: Trees) -> Trees:
    return jax.tree.map(jnp.copy, trees)


def count_bytes(trees: Trees, *, is_private: bool) -> int:
    """Bytes that the directory is to take: all, or in a private one this process's part."""
    leaves = jax.tree.leaves(trees)

    if not is_private:
        return sum(leaf.nbytes for leaf in leaves)

    shards = (shard for leaf in leaves for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)


def write_texts(partial: Path, texts: Mapping[str, str]) -> None:
    """Makes the directory of a save, with its small files."""
    partial.mkdir(parents=True)

    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")


def write_manifest(partial: Path, digests: dict[str, Any]) -> None:
    """Seals a save: from now on a changed byte is seen."""
    (partial / MANIFEST_FILE).write_text(manifest_text(digests), encoding="utf-8")


def flush(directory: Path) -> None:
    """Puts every file on disk, so that a rename never gets there before its content."""
    for path in (directory, *directory.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def give_names(partial: Path, paths: Sequence[Path]) -> None:
    """Publishes a whole save under each of `paths`, the last one first. What is there and no
    checkpoint is renamed."""
    for stray in paths:
        if os.path.lexists(stray) and not is_checkpoint(stray):
            moved = set_aside(stray, DAMAGED).name
            log.warning("%s is in the way of a checkpoint: renamed to %s", stray.name, moved)

    first, *others = paths

    for path in others:
        twin = partial.with_name(f"{partial.name}-{path.name}")
        shutil.copytree(partial, twin, copy_function=_link)
        files.replace(twin, path)

    files.replace(partial, first)


def _link(source: str, target: str) -> None:
    """The same file under two names, which takes no space; a copy where links are not to be had."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def delete_quietly(path: Path) -> None:
    """Deletes a directory where it can be; a later start tries again."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
