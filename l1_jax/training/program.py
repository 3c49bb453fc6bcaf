"""The compiled parts of a run, from its config and its mesh: the same for a run and for a plan."""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import Resolved, stages
from l1_jax.config.stages import largest
from l1_jax.data.batches import batch_fields
from l1_jax.data.sources import Fields, dims_of, token_fields
from l1_jax.errors import UserError
from l1_jax.model.backends import Backend, choose_attention
from l1_jax.model.packed import NOTHING, Packing
from l1_jax.model.stack import BLOCKS, Group, group_layers, layer_paths
from l1_jax.model.transformer import build
from l1_jax.objectives.objective import Objective
from l1_jax.objectives.table import make_objective
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import Dims, named
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.state import (
    Predicate,
    TrainState,
    Tree,
    create_state,
    everything,
    partition,
    place_state,
)
from l1_jax.training.step import make_train_step


class Program(NamedTuple):
    """A run's functions, and the shapes and placement of its state."""

    eval_graphdef: nnx.GraphDef  # the model as an evaluation runs it, which drops nothing
    axes: Tree  # names of all parameters' dimensions
    abstract: TrainState  # shapes with shardings
    create: Any  # jitted, () or (weights) -> the state of step 0
    borrowed: Tree  # shapes with shardings of other models' arrays
    dims: Mapping[str, Dims]  # names of the dimensions of a batch's fields
    train_step: Any  # jitted, (state, borrowed, batch) -> (state, metrics); compiled for each shape
    attention: Backend  # that the train step takes
    objective: Objective  # what it minimises


def remat_policy(config: Resolved) -> str:
    """The name of the policy that `training.gradient_checkpointing` means; false keeps all that
    takes time to make."""
    asked = config.training.gradient_checkpointing
    return {"True": "full", "False": "dots"}.get(str(asked), str(asked))


def make_program(
    config: Resolved,
    mesh: Mesh | AbstractMesh,
    is_trained: Predicate | None = None,
    packing: Packing = NOTHING,
    dims: Mapping[str, Dims] | None = None,
) -> Program:
    """The functions of a run; nothing is compiled or allocated yet.

    Args:
        config: of the run.
        mesh: an abstract one has no devices, and is enough to know what lies where.
        is_trained: which parameters are, by their paths; None is what the config freezes.
        packing: which weights are packed, and how, as the checkpoint has them that the run begins
            with.
        dims: of a batch's fields, from the source; None is what the config's source would give.

    Raises:
        UserError: what is frozen does not go together with the model, the mesh, or what is packed.
    """
    training = config.training
    microbatches = config.parallelism.pipeline_microbatches
    layout = Layout.of(mesh, training.batch_size, microbatches)
    dtype = jnp.dtype(training.precision)

    attention = choose_attention(config, mesh, config.model.attention_rate)
    eval_attention = choose_attention(config, mesh, dropout=0.0).name
    remat = remat_policy(config)
    is_trained = is_trained or choose_trained(config)
    check_frozen(packing, config.model.n_layers, is_trained)
    groups = choose_groups(config, is_trained, layout)

    graphdef, initialise, axes = build(
        config.model, dtype, remat, layout, attention=attention.name, groups=groups, packing=packing
    )
    eval_graphdef = build(
        config.model, dtype, layout=layout, attention=eval_attention, groups=groups
    )[0]

    trained_axes, _ = partition(axes, is_trained)
    optimizer = create_optimizer(training, trained_axes)
    create = functools.partial(
        create_state,
        initialise,
        optimizer,
        seed=training.seed,
        is_float16=training.precision == "float16",
        has_average=training.ema_decay is not None,
        is_trained=is_trained,
    )
    abstract = place_state(jax.eval_shape(create), axes, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    objective = make_objective(config.objective)
    if dims is None:
        dims = dims_of(fields_of(config, config.model.max_seq_length))

    step = make_train_step(graphdef, optimizer, config, objective, dims)
    jitted_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
    jitted_create = jax.jit(
        create, donate_argnums=0, out_shardings=shardings, compiler_options=_compiled_quickly(mesh)
    )
    return Program(
        eval_graphdef=eval_graphdef,
        axes=axes,
        abstract=abstract,
        create=jitted_create,
        borrowed={},
        dims=dims,
        train_step=jitted_step,
        attention=attention,
        objective=objective,
    )


def choose_trained(config: Resolved) -> Predicate:
    """Which parameters a run trains: those that no pattern of `transfer.freeze` finds.

    Raises:
        UserError: a pattern finds none, or together they find all.
    """
    patterns = config.transfer.freeze if config.transfer else ()
    if not patterns:
        return everything

    axes = build(config.model)[2]
    names = layer_paths(axes)
    layers = range(config.model.n_layers)
    paths = [f"{BLOCKS}.{number}.{name}" for number in layers for name in names]
    paths += [name for name in _leaf_paths(axes) if not name.startswith(f"{BLOCKS}.")]

    for pattern in patterns:
        if not any(re.search(pattern, path) for path in paths):
            what = f"transfer.freeze has {pattern!r}, which finds no parameter"
            remedy = f"Write it for paths such as {paths[0]} and {paths[-1]}"
            raise UserError(what, remedy)

    def is_trained(path: str) -> bool:
        return not any(re.search(pattern, path) for pattern in patterns)

    if not any(map(is_trained, paths)):
        raise UserError("transfer.freeze finds all parameters", "Leave some to be trained")

    return is_trained


def check_frozen(packing: Packing, num_layers: int, is_trained: Predicate) -> None:
    """Raises UserError where a packed weight would be trained, in any layer."""
    prefix = f"{BLOCKS}."
    paths = []

    for name in packing:
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            paths += [f"{prefix}{number}.{inner}" for number in range(num_layers)]
        else:
            paths.append(name)

    trained = [path for path in paths if is_trained(path)]
    if trained:
        what = f"transfer.freeze leaves packed weights to be trained, such as {trained[0]}"
        remedy = "Have its patterns find them all, or begin with a checkpoint that is not packed"
        raise UserError(what, remedy)


def choose_groups(config: Resolved, is_trained: Predicate, layout: Layout) -> tuple[Group, ...]:
    """The groups of the layers: those that follow one another and have the same frozen parts.

    Raises:
        UserError: a pipeline would have several, which its stages cannot share.
    """
    names = layer_paths(build(config.model)[2])
    groups = group_layers(config.model.n_layers, names, is_trained)

    if len(groups) > 1 and layout.stages > 1:
        shown = ", ".join(f"layers {group.name}" for group in groups)
        what = f"transfer.freeze treats layers in {len(groups)} ways ({shown})"
        remedy = "Set parallelism.pipeline to 1, or freeze the same parts of all layers"
        raise UserError(f"{what}, which the stages of a pipeline cannot share", remedy)

    return groups


def _leaf_paths(axes: Tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def _compiled_quickly(mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Options for the program that makes the state, which runs once.

    On CPU it compiles in a third of the time, runs as fast and gives the same bits
    (benchmarks/RESULTS.md). None elsewhere, or where XLA_FLAGS has a level.
    """
    name = "xla_backend_optimization_level"
    is_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    is_set = name in os.environ.get("XLA_FLAGS", "")
    return {name: 1} if is_cpu and not is_set else {}


def fields_of(config: Resolved, length: int) -> Fields:
    """The fields of a batch with rows of `length`, as the config says; no data is read."""
    source_fields = token_fields(length, document_mask=config.data.document_mask)
    return batch_fields(source_fields)


def batch_shapes(config: Resolved, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and placement of what `train_step` takes as its largest batch."""
    stage = largest(stages(config))

    shapes = {
        name: jax.ShapeDtypeStruct(
            (stage.rows, *field.row_shape), field.dtype, sharding=named(mesh, *field.dims)
        )
        for name, field in fields_of(config, stage.length).items()
    }
    stop = jax.ShapeDtypeStruct((mesh.size,), jnp.bool_, sharding=named(mesh, "device"))
    return shapes | {"stop": stop}
