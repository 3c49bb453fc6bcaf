"""Where a run's arrays come from: nothing, its own checkpoint, or another checkpoint's weights."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax

from l1_jax.checkpoint.manifest import read_info, saved_items
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
from l1_jax.training.average import AVERAGE, begin_average
from l1_jax.training.program import Program
from l1_jax.training.state import PARAMS, TrainState, Tree, from_trees, merge, to_trees

# What users call the two sets of parameters that a checkpoint may have.
WEIGHTS = ("average", "raw")


class Weights(NamedTuple):
    """A set of parameters of a checkpoint."""

    checkpoint: Path
    item: str  # from `choose_weights`


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
    array differs.

    An average that the run keeps now, and did not keep there, begins with the weights.
    """
    if AVERAGE in abstract.beside and AVERAGE not in saved_items(checkpoint):
        others = {name: tree for name, tree in abstract.beside.items() if name != AVERAGE}
        without = dataclasses.replace(abstract, beside=others)
        return _begin_average(restore_state(checkpoint, without))

    return from_trees(restore(checkpoint, to_trees(abstract)), abstract)


def _begin_average(state: TrainState) -> TrainState:
    """A state whose average begins with its weights, and lies as they do."""
    shardings = {AVERAGE: jax.tree.map(lambda leaf: leaf.sharding, state.params)}
    begun = jax.jit(begin_average, out_shardings=shardings)(state.params)
    return dataclasses.replace(state, beside=state.beside | begun)


def choose_weights(checkpoint: Path, weights: str | None = None) -> str:
    """The item of a checkpoint whose parameters are to be used.

    Args:
        checkpoint: its directory.
        weights: `average` or `raw`; None is the average where there is one.

    Raises:
        UserError: there is no average, or no such word.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"`weights` is {weights!r}", f"Give {' or '.join(WEIGHTS)}")

    has_average = AVERAGE in saved_items(checkpoint)
    if weights == "average" and not has_average:
        what = f"{display_name(checkpoint)} has no average of its weights"
        raise UserError(what, "Leave `weights` out, or train with training.ema_decay")

    return AVERAGE if has_average and weights != "raw" else PARAMS


def read_packing(checkpoint: Path, item: str = PARAMS) -> dict[str, str]:
    """Which weights of an item of a checkpoint are packed, and how; see `packed.Packing`."""
    return find_packing(read_shapes(checkpoint, item))


def expect_packing(config: Resolved) -> dict[str, str]:
    """Which weights a run that begins by this config would have packed: those of `transfer.from`.

    Where no checkpoint is there, or not on a disk here, which is said, none.
    """
    path = config.transfer.from_ if config.transfer else None
    return _expect_packing_of(path) if path else {}


# A plan asks for every mesh that it looks at.
@functools.cache
def _expect_packing_of(path: str) -> dict[str, str]:
    if not is_url(path):
        try:
            return read_packing(find_checkpoint(path))
        except UserError:
            # A run that begins needs it, and says so; one that is resumed does not.
            pass

    log.warning("transfer.from %s is not looked at: its weights count as float32", path)
    return {}


def restore_params(checkpoint: Path, abstract: Tree, item: str = PARAMS) -> Tree:
    """The model's parameters alone.

    Args:
        checkpoint: its directory.
        abstract: shapes with shardings.
        item: of the checkpoint, from `choose_weights`.
    """
    weights = restore(checkpoint, {item: join_stack(abstract)})[item]
    return split_like(weights, abstract)


def transfer_weights(
    weights: Weights, program: Program, config: Resolved, tokenizer_sha256: str
) -> TrainState:
    """The state of step 0 with the weights of another checkpoint.

    Args:
        weights: whose files have been looked at.
        program: of the run.
        config: of the run.
        tokenizer_sha256: of the run's tokenizer, by which its data was prepared.

    Raises:
        UserError: the checkpoint does not match; `details` lists every array and key that differs.
    """
    wanted = merge(program.abstract.params, program.abstract.held)
    check_match(weights, wanted, config, tokenizer_sha256)
    return program.create(restore_params(weights.checkpoint, wanted, weights.item))


def check_match(weights: Weights, wanted: Tree, config: Resolved, tokenizer_sha256: str) -> None:
    """Raises UserError where a checkpoint's weights are not those of this model: an array that is
    missing, or one too many, a shape, a type, a key that arrays do not show, the tokenizer."""
    source = weights.checkpoint
    there = read_shapes(source, weights.item)
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
