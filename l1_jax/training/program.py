"""The compiled parts of a run, from its config and its mesh: the same for a run and for a plan."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import Resolved
from l1_jax.model.backends import Backend, choose_attention
from l1_jax.model.transformer import build
from l1_jax.objectives.table import make_objective
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.placement import per_device
from l1_jax.parallel.sharding import named
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
    abstract: TrainState  # shapes with shardings
    create: Any  # jitted, () -> the state of step 0
    borrowed: Tree  # shapes with shardings of other models' arrays
    train_step: Any  # jitted, (state, borrowed, batch) -> (state, metrics)
    attention: Backend  # that the train step takes


def remat_policy(config: Resolved) -> str:
    """The name of the policy that `training.gradient_checkpointing` means; false keeps all that
    takes time to make."""
    asked = config.training.gradient_checkpointing
    return {"True": "full", "False": "dots"}.get(str(asked), str(asked))


def make_program(
    config: Resolved, mesh: Mesh | AbstractMesh, is_trained: Predicate = everything
) -> Program:
    """The functions of a run; nothing is compiled or allocated yet.

    Args:
        config: of the run.
        mesh: an abstract one has no devices, and is enough to know what lies where.
        is_trained: which parameters are, by their paths.
    """
    training = config.training
    microbatches = config.parallelism.pipeline_microbatches
    layout = Layout.of(mesh, training.batch_size, microbatches)
    dtype = jnp.dtype(training.precision)

    attention = choose_attention(config, mesh, config.model.attention_rate)
    eval_attention = choose_attention(config, mesh, dropout=0.0).name
    remat = remat_policy(config)
    graphdef, initialise, axes = build(config.model, dtype, remat, layout, attention.name)
    eval_graphdef = build(config.model, dtype, layout=layout, attention=eval_attention)[0]

    trained_axes, _ = partition(axes, is_trained)
    optimizer = create_optimizer(training, trained_axes)
    create = functools.partial(
        create_state,
        initialise,
        optimizer,
        seed=training.seed,
        is_float16=training.precision == "float16",
        is_trained=is_trained,
    )
    abstract = place_state(jax.eval_shape(create), axes, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    objective = make_objective(config.objective)
    step = make_train_step(graphdef, optimizer, config, objective)
    jitted_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
    jitted_create = jax.jit(
        create, out_shardings=shardings, compiler_options=_compiled_quickly(mesh)
    )
    return Program(
        eval_graphdef=eval_graphdef,
        abstract=abstract,
        create=jitted_create,
        borrowed={},
        train_step=jitted_step,
        attention=attention,
    )


def _compiled_quickly(mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Options for the program that makes the state, which runs once.

    On CPU it compiles in a third of the time, runs as fast and gives the same bits
    (benchmarks/RESULTS.md). None elsewhere, or where XLA_FLAGS has a level.
    """
    name = "xla_backend_optimization_level"
    is_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    is_set = name in os.environ.get("XLA_FLAGS", "")
    return {name: 1} if is_cpu and not is_set else {}


def batch_shapes(config: Resolved, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and placement of what `train_step` takes as its batch."""
    rows = config.training.global_batch_size
    length = config.model.max_seq_length

    types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.document_mask:
        types |= {"segment_ids": jnp.int32, "positions": jnp.int32}

    placed = named(mesh, "batch", "length")
    shapes = {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=placed)
        for name, dtype in types.items()
    }
    shapes["row_hash"] = jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=named(mesh, "batch"))
    shapes["stop"] = jax.ShapeDtypeStruct((mesh.size,), jnp.bool_, sharding=per_device(mesh))
    return shapes
