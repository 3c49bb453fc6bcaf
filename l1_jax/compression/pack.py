"""A checkpoint with its weights packed, made of one whose weights are float32."""

import dataclasses
from pathlib import Path

import jax

from l1_jax.checkpoint.manifest import CheckpointInfo
from l1_jax.checkpoint.names import CONFIG_FILE, TOKENIZER_FILE
from l1_jax.checkpoint.write import write
from l1_jax.errors import UserError
from l1_jax.loading import load
from l1_jax.model.packed import dotted, is_packed, pack_params
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import summed_dims
from l1_jax.storage.remote import display_name
from l1_jax.training.state import PARAMS, Predicate, everything


def pack_checkpoint(
    model: str | Path,
    output: Path,
    kind: str = "int8",
    is_chosen: Predicate = everything,
    *,
    device: str = "auto",
) -> None:
    """Writes a model with its weights packed, rounded to nearest.

    It has the weights alone: what is needed to evaluate and generate, or to begin a run.

    Args:
        model: a checkpoint, or a run (its best model, else its newest); a path or a URL.
        output: what the new checkpoint is called; nothing may be there.
        kind: how they are packed, a name in `PACKERS`.
        is_chosen: which of the weights, by their paths with all layers stacked, as
            `blocks.mlp.up.kernel`; what is no weight of a product stays float32.
        device: that computes: `auto` (the best present), `cpu`, `gpu` or `tpu`.

    Raises:
        UserError: the model is damaged or packed, or the name is taken.
    """
    loaded = load(model, device=device)
    if any(map(is_packed, jax.tree.leaves(loaded.params, is_leaf=is_packed))):
        what = f"{display_name(loaded.path)} is packed already"
        raise UserError(what, "Use the checkpoint that it was made of")

    shape = loaded.config.model
    packing = choose_packing(shape, kind, is_chosen)
    packed = jax.jit(lambda params: pack_params(params, summed_dims(shape), packing))
    params = packed(loaded.params)

    names = (CONFIG_FILE, TOKENIZER_FILE)
    texts = {name: (loaded.path / name).read_text(encoding="utf-8") for name in names}
    write(output, {PARAMS: params}, texts, as_another_model(loaded.info))


def choose_packing(
    shape: ModelConfig, kind: str, is_chosen: Predicate = everything
) -> dict[str, str]:
    """How each weight of a product is packed that is chosen."""
    leaves = jax.tree_util.tree_leaves_with_path(
        summed_dims(shape), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    weights = [dotted(path) for path, dims in leaves if dims]
    return {path: kind for path in weights if is_chosen(path)}


def as_another_model(info: CheckpointInfo) -> CheckpointInfo:
    """What a checkpoint says of itself whose weights were made of another's: as many steps and
    tokens, but no loss of its own yet."""
    return dataclasses.replace(
        info,
        best_loss=None,
        best_step=None,
        evaluations_since_best=0,
        evaluation_due=False,
        unlogged=None,
    )
