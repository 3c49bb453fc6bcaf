"""Where a run's arrays come from: nothing, its own checkpoint, or another checkpoint's weights."""

import dataclasses
from pathlib import Path

import jax

from l1_jax.checkpoint.manifest import read_info
from l1_jax.checkpoint.names import CONFIG_FILE
from l1_jax.checkpoint.restore import find_checkpoint, read_shapes, restore, shapes_of
from l1_jax.config.key import keys_of, to_text, values_of
from l1_jax.config.resolve import Resolved
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.model.packed import find_packing
from l1_jax.model.stack import join_stack, split_like
from l1_jax.storage.remote import display_name, is_url
from l1_jax.training.program import Program
from l1_jax.training.state import PARAMS, TrainState, Tree, from_trees, merge, select, to_trees

# Keys of the model that say how long or how large it is: arrays differ where it matters.
_SIZES = (
    "model.vocab_size",
    "model.max_seq_length",
    "model.n_inner",
    "model.n_kv_heads",
    "model.head_size",
)


def restore_state(checkpoint: Path, abstract: TrainState) -> TrainState:
    """The state of a checkpoint, placed as `abstract` is: shapes with shardings. UserError where an
    array differs."""
    return from_trees(restore(checkpoint, to_trees(abstract)), abstract)


def read_packing(checkpoint: Path) -> dict[str, str]:
    """Which weights of a checkpoint are packed, and how; see `packed.Packing`."""
    return find_packing(read_shapes(checkpoint, PARAMS))


def expect_packing(config: Resolved) -> dict[str, str]:
    """Which weights a run that begins by this config would have packed: those of `transfer.from`.

    Where that is not on a disk here, which is said, none.
    """
    path = config.transfer.from_ if config.transfer else None
    if path is None:
        return {}

    if is_url(path) or not Path(path).exists():
        log.warning("transfer.from %s is not looked at: its weights count as float32", path)
        return {}

    return read_packing(find_checkpoint(path))


def restore_params(checkpoint: Path, abstract: Tree) -> Tree:
    """The model's parameters alone; `abstract` are shapes with shardings."""
    weights = restore(checkpoint, {PARAMS: join_stack(abstract)})[PARAMS]
    return split_like(weights, abstract)


def transfer_weights(
    source: Path, program: Program, config: Resolved, tokenizer_sha256: str
) -> TrainState:
    """The state of step 0 with the weights of another checkpoint.

    Args:
        source: the checkpoint; its files have been looked at.
        program: of the run.
        config: of the run.
        tokenizer_sha256: of the run's tokenizer, by which its data was prepared.

    Raises:
        UserError: the checkpoint does not match; `details` lists every array and key that differs.
    """
    wanted = merge(program.abstract.params, program.abstract.held)
    check_match(source, wanted, config, tokenizer_sha256)
    state = program.create()

    for leaf in jax.tree.leaves((state.params, state.held)):
        leaf.delete()  # there may be no room for two

    weights = restore_params(source, wanted)
    return dataclasses.replace(
        state, params=select(weights, state.params), held=select(weights, state.held)
    )


def check_match(source: Path, wanted: Tree, config: Resolved, tokenizer_sha256: str) -> None:
    """Raises UserError where a checkpoint's weights are not those of this model: an array that is
    missing, or one too many, a shape, a type, a key that arrays do not show, the tokenizer."""
    there = read_shapes(source, PARAMS)
    here = shapes_of(join_stack(wanted))
    lines = []

    for name in sorted(there | here):
        if name not in there:
            lines.append(f"missing there: {name}, {here[name]}")
        elif name not in here:
            lines.append(f"not in this model: {name}, {there[name]}")
        elif there[name] != here[name]:
            lines.append(f"{name} is {there[name]} there and {here[name]} here")

    lines += _differing_keys(source, config)

    if read_info(source).tokenizer_sha256 != tokenizer_sha256:
        lines.append("its tokenizer is another one: prepare the data with its tokenizer.json")

    if lines:
        what = f"transfer.from {display_name(source)} does not match this model"
        remedy = "Take the model section of its config.yaml, or another checkpoint"
        shown = lines if len(lines) > 1 else ()
        raise UserError(what if shown else f"{what}: {lines[0]}", remedy, shown)


def _differing_keys(source: Path, config: Resolved) -> list[str]:
    """Keys of the model that change what it computes and no array's shape."""
    old = values_of(load_config(source / CONFIG_FILE, of_a_run=True))
    new = values_of(config)

    fatal = [name for name, field in keys_of(Config) if field.metadata["resume"] == "fatal"]
    names = [name for name in fatal if name.startswith("model.") and name not in _SIZES]
    changed = [name for name in names if old[name] != new[name]]
    return [
        f"{name} is {to_text(old[name])} there and {to_text(new[name])} here" for name in changed
    ]
