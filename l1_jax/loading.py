"""A trained model, ready to be used: what evaluation and generation start from."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from l1_jax.checkpoint.manifest import CheckpointInfo, check_undamaged, read_info
from l1_jax.checkpoint.names import CONFIG_FILE, TOKENIZER_FILE
from l1_jax.checkpoint.restore import find_checkpoint
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.data.tokenizer_kinds import open_tokenizer
from l1_jax.devices.select import select_devices
from l1_jax.errors import UserError
from l1_jax.model.backends import choose_attention
from l1_jax.model.transformer import build
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.mesh import ALL_DATA, create_mesh
from l1_jax.parallel.section import ParallelismConfig
from l1_jax.parallel.sharding import parameter_shardings
from l1_jax.storage.remote import display_name
from l1_jax.training.average import AVERAGE
from l1_jax.training.initial import choose_weights, read_packing, restore_params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model from a checkpoint, with all that belongs to it."""

    path: Path
    config: Config
    info: CheckpointInfo
    tokenizer: Tokenizer
    mesh: Mesh
    graphdef: nnx.GraphDef
    params: dict[str, Any]


def load(path: str | Path, *, device: str = "auto", weights: str | None = None) -> LoadedModel:
    """Loads the model of a checkpoint onto one device.

    Args:
        path: the checkpoint, or a run (its best model, else its newest); a path or a URL.
        device: `auto` (the best present), `cpu`, `gpu` or `tpu`.
        weights: `average` or `raw`; None is their average where the run kept one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return load_model(path, select_devices(device)[:1], weights=weights)


def load_model(
    path: str | Path,
    devices: list[jax.Device],
    parallelism: ParallelismConfig = ALL_DATA,
    batch_size: int = 1,
    weights: str | None = None,
) -> LoadedModel:
    """Loads the model of a checkpoint onto `devices`, by default whole on each.

    Args:
        path: one that `find_checkpoint` takes.
        devices: what it will run on.
        parallelism: how they share the work.
        batch_size: the rows of each part of a batch.
        weights: `average` or `raw`; None is their average where the run kept one.

    Raises:
        UserError: it is damaged, or does not divide over the devices.
    """
    directory = find_checkpoint(path)
    item = choose_weights(directory, weights)
    check_undamaged(directory, (item,))
    if item == AVERAGE:
        log.info("using the average of the weights of %s", display_name(directory))
    config = load_config(directory / CONFIG_FILE, of_a_run=True)

    mesh = create_mesh(parallelism, devices)
    check_divisible(config.model, mesh)
    layout = Layout.of(mesh, batch_size, parallelism.pipeline_microbatches)

    graphdef, initialise, axes = build(
        config.model,
        jnp.dtype(config.training.precision),
        layout=layout,
        attention=_choose_attention_here(config, mesh),
        packing=read_packing(directory, item),
    )
    shapes = jax.eval_shape(initialise, jax.random.key(0))
    abstract = jax.tree.map(
        lambda leaf, sharding: leaf.update(sharding=sharding),
        shapes,
        parameter_shardings(mesh, axes),
    )

    return LoadedModel(
        path=directory,
        config=config,
        info=read_info(directory),
        tokenizer=open_tokenizer(directory / TOKENIZER_FILE),
        mesh=mesh,
        graphdef=graphdef,
        params=restore_params(directory, abstract, item),
    )


def _choose_attention_here(config: Config, mesh: Mesh) -> str:
    """The name of the run's way of attention, or of another where these devices cannot run it."""
    try:
        return choose_attention(config, mesh, dropout=0.0).name
    except UserError as error:
        # It was trained on other devices.
        automatic = config.replace("training", attention="auto")
        attention = choose_attention(automatic, mesh, dropout=0.0)
        log.warning("%s; here %s is used", error.what, attention.name)
        return attention.name
