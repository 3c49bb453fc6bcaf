"""The compiled parts of a run, from its config and its mesh: the same for a run and for a plan of one."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from optax import GradientTransformation

from l1_jax.config.schema import Config
from l1_jax.model.backends import choose_attention
from l1_jax.model.transformer import build
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.placement import per_device
from l1_jax.parallel.sharding import named
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.state import TrainState, create_state, place_state
from l1_jax.training.step import make_train_step


class Program(NamedTuple):
    """A run's functions, and the shapes and placement of its state."""

    eval_graphdef: nnx.GraphDef  # the model as an evaluation runs it, which drops nothing
    abstract: TrainState  # shapes with shardings
    create: Any  # jitted, () -> the state of step 0
    train_step: Any  # jitted, (state, batch) -> (state, metrics)


def remat_policy(config: Config) -> str:
    """The name of the policy that `training.gradient_checkpointing` means; false keeps all that takes time to make."""
    asked = config.training.gradient_checkpointing
    return {"True": "full", "False": "dots"}.get(str(asked), str(asked))


def make_program(config: Config, mesh: Mesh | AbstractMesh) -> Program:
    """The functions of a run; nothing is compiled or allocated yet. `config` is resolved. An abstract mesh has no
    devices, and is enough to know what lies where."""
    training = config.training
    assert isinstance(training.batch_size, int)
    layout = Layout.of(mesh, training.batch_size, config.parallelism.pipeline_microbatches)
    dtype, remat = jnp.dtype(training.precision), remat_policy(config)
    trained, evaluated = (choose_attention(config, mesh, dropout).name for dropout in (config.model.dropout, 0.0))
    graphdef, initialise, axes = build(config.model, dtype, remat, layout, trained)
    eval_graphdef = build(config.model, dtype, layout=layout, attention=evaluated)[0]
    optimizer: GradientTransformation = create_optimizer(training, axes)
    create = functools.partial(create_state, initialise, optimizer, training.seed, training.precision == "float16")
    abstract = place_state(jax.eval_shape(create), axes, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_train_step(graphdef, optimizer, config)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
    creates = jax.jit(create, out_shardings=shardings, compiler_options=_compiled_quickly(mesh))
    return Program(eval_graphdef, abstract, creates, jitted)


def _compiled_quickly(mesh: Mesh | AbstractMesh) -> dict[str, Any]:
    """Options for the program that makes the state, which runs once: on CPU it compiles in a third of the time, runs as
    fast and gives the same bits (benchmarks/RESULTS.md). None elsewhere, or where XLA_FLAGS has a level."""
    is_cpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"
    name = "xla_backend_optimization_level"
    return {name: 1} if is_cpu and name not in os.environ.get("XLA_FLAGS", "") else {}


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and placement of what `train_step` takes as its batch; `config` is resolved."""
    rows, length = config.training.global_batch_size, config.model.max_seq_length
    types = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.document_mask:
        types |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    placed = named(mesh, "batch", "length")
    shapes = {name: jax.ShapeDtypeStruct((rows, length), kind, sharding=placed) for name, kind in types.items()}
    shapes["row_hash"] = jax.ShapeDtypeStruct((rows,), jnp.uint32, sharding=named(mesh, "batch"))
    return shapes | {"stop": jax.ShapeDtypeStruct((mesh.size,), jnp.bool_, sharding=per_device(mesh))}
