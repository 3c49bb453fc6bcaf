"""Memory, traffic and time of a train step by formula, for any device; docs/planning.md has the formulas in words.

Legend: B batch, T length, D model width, V vocabulary (padded), L layers.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.schema import Config
from l1_jax.devices.kinds import DeviceKind
from l1_jax.model.backends import choose_attention
from l1_jax.model.flops import count_parameters, flops_per_token
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.cross_entropy import choose_num_chunks
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.section import ParallelismConfig
from l1_jax.parallel.sharding import RULES
from l1_jax.training.matrices import muon_flops
from l1_jax.training.program import make_program, remat_policy

# What a good run reaches of the data sheet's figures: assumed, not measured.
UTILISATION = {"compute": 0.5, "memory": 0.8, "network": 0.7}
# What a formula says must leave this share of the memory free, for what it does not know.
RESERVE = 0.08
# What a layer's backward pass holds at once, as a share of what the layer could keep: without remat, and with. Blocks
# of scores are not kept, and come on top. Held against the GPU compiler's figures (docs/planning.md).
WORKING_SET = {"plain": (0.33, 0.75), "blocked": (1.5, 2.0)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """All of one device and one step."""

    memory: dict[str, int]  # bytes by what they hold
    traffic: dict[str, int]  # bytes sent, by the kind of collective
    seconds: dict[str, float]  # compute, memory, network
    attention: str  # the way that the devices take

    @property
    def total_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.seconds)


def step_seconds(seconds: dict[str, float]) -> float:
    """Of a step: computing and memory overlap, the network (by assumption) not."""
    return max(seconds["compute"], seconds["memory"]) + seconds["network"]


def network_seconds(traffic: dict[str, int], kind: DeviceKind) -> float:
    return sum(traffic.values()) / (kind.link * UTILISATION["network"])


def usable_by_formula(limit: int) -> int:
    """The part of `limit` that an estimate may fill."""
    return int(limit * (1 - RESERVE))


def local_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes or arrays on one device; exact."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass, per row of the batch and all layers."""

    split: int  # of arrays that the tensor axis divides: heads and hidden units
    whole: int  # of all others
    keys: int  # of keys and values, which the context axis gathers (a part of `split`)


@functools.cache
def kept_bytes(model: ModelConfig, dtype: str, remat: str, attention: str = "plain") -> Kept:
    """What jax keeps of the real model, by the shapes of the residuals of `jax.vjp`; no formula to fall out of date."""
    hidden = model.hidden_size if model.hidden_size != model.n_embd else 2 * model.n_embd
    fewer = model.hidden_size / hidden
    # So that a layer's arrays can be told by their dimensions.
    model = dataclasses.replace(model, scan_layers=True, n_inner=hidden)
    graphdef, initialise, _ = build(model, jnp.dtype(dtype), remat, attention=attention)
    params = jax.eval_shape(initialise, jax.random.key(0))

    def residuals(rows: int) -> list[Any]:
        tokens = jax.ShapeDtypeStruct((rows, model.max_seq_length), jnp.int32)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)) if model.dropout else None

        def backward(params: Any, tokens: Any, keys: Any) -> Any:
            return jax.vjp(lambda p: nnx.merge(graphdef, p)(tokens, None, None, keys)[0], params)[1]

        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):  # of one device, also inside a run's mesh
            return jax.tree.leaves(jax.eval_shape(backward, params, tokens, keys))

    split = whole = 0
    for one, two in zip(residuals(1), residuals(2), strict=True):
        size = (two.size - one.size) * one.dtype.itemsize  # what does not grow with the rows are weights
        if len(one.shape) == 4 and one.shape[-1] == hidden:
            split += int(size * fewer)
        elif len(one.shape) >= 5:
            split += size
        else:
            whole += size
    keys = 2 * model.n_layers * model.max_seq_length * model.kv_heads * (model.n_embd // model.n_heads)
    return Kept(split, whole, 0 if remat == "full" else keys * jnp.dtype(dtype).itemsize)


class StateSize(NamedTuple):
    """Bytes of the parameters and of the whole state on a device, and what of the whole model follows from them."""

    params: int
    state: int
    num_parameters: int
    optimizer_flops: int  # of a step, where there are enough to count


@functools.cache
def _state(config: Config, mesh: Mesh | AbstractMesh) -> StateSize:
    state, axes = make_program(config, mesh).abstract, build(config.model)[2]
    flops = muon_flops(state.params, axes) if config.training.optimizer == "muon" else 0
    return StateSize(local_bytes(state.params), local_bytes(state), count_parameters(config.model, state.params), flops)


def state_bytes(config: Config, mesh: Mesh | AbstractMesh) -> StateSize:
    """See `_state`, which does not depend on the batch nor on what is recomputed."""
    config = config.replace("training", batch_size=1, gradient_accumulation_steps=1, gradient_checkpointing=False)
    return _state(dataclasses.replace(config, parallelism=ParallelismConfig()), mesh)


def estimate(config: Config, mesh: Mesh | AbstractMesh, kind: DeviceKind | None = None) -> Estimate:
    """Of the resolved `config`, which fits `mesh`. Without a kind all times are 0."""
    model, training, sizes = config.model, config.training, dict(mesh.shape)
    rows, accumulation = training.batch_size, training.gradient_accumulation_steps
    assert isinstance(rows, int)
    tensor, context, stages = sizes["tensor"], sizes["context"], sizes["pipeline"]
    length, remat = model.max_seq_length // context, remat_policy(config)
    item = jnp.dtype(training.precision).itemsize
    params, state, num_parameters, optimizer_flops = state_bytes(config, mesh)
    microbatches = Layout.of(mesh, rows, config.parallelism.pipeline_microbatches).microbatches
    ticks = (microbatches + stages - 1) / microbatches  # a pipeline keeps and does something in idle ticks too

    platform = None if kind is None else "tpu" if kind.is_tpu else "gpu"
    attention = choose_attention(config, mesh, model.dropout, platform).name
    backend = "plain" if attention == "plain" else "blocked"  # which keeps what the devices' own kernels keep

    def kept(policy: str) -> float:
        """Of one microbatch."""
        each = kept_bytes(model, training.precision, policy, backend)
        gathered = each.keys * (1 - 1 / context)
        return rows * ((each.split / context + gathered) / tensor + each.whole / context) * ticks / stages

    table = 4 * model.padded_vocab_size * model.n_embd / (tensor * stages)
    positions = length // choose_num_chunks(rows, length, model.padded_vocab_size)
    logits = 10 * rows * positions * model.padded_vocab_size / (tensor * stages)  # float32, gradient, compute type
    layer = kept("none") / (model.n_layers / stages) / ticks / microbatches
    working = layer * WORKING_SET[backend][remat != "none"]
    gathered_weights = 2 * params * sizes["fsdp"] / model.n_layers * stages if sizes["fsdp"] > 1 else 0.0
    memory = {
        "parameters": params,
        "optimizer": state - params,
        "gradients": params * (2 if accumulation > 1 else 1),
        "activations": int(kept(remat)),
        "logits": int(logits),
        "temporaries": int(max(working - logits, 0) + gathered_weights + (table if sizes["fsdp"] > 1 else 0)),
    }
    if kind is None:
        return Estimate(memory, {}, dict.fromkeys(("compute", "memory", "network"), 0.0), attention)

    flops = rows * accumulation * length * flops_per_token(num_parameters, model) / (tensor * stages)
    share = 12 * model.n_layers * model.n_embd * model.max_seq_length / flops_per_token(num_parameters, model)
    # The forward pass is a third, and the scores are half of attention.
    again = {"none": 0.0, "dots": share / 6, "dots_no_batch": share / 3, "full": 1 / 3}[remat]
    # float32 runs as TF32, half as fast, on a GPU; a TPU rounds to bfloat16.
    peak = kind.peak_flops / (2 if item == 4 and not kind.is_tpu else 1)
    # Weights three times; what a layer keeps is written and read, and its gradients too, and what is recomputed is
    # written once more; the optimizer reads parameters, gradients and moments and writes as much.
    activations = 4 * kept("none") if remat == "none" else 5 * kept("dots")
    moved = accumulation * (3 * params * sizes["fsdp"] + activations + 3 * logits * length / positions)
    moved += 2 * (params + state)
    orthogonal = optimizer_flops * padding_ratio(model, sizes) / (sizes["fsdp"] * tensor * stages)
    orthogonal *= 2 if item == 2 and not kind.is_tpu else 1
    traffic = estimate_traffic(config, sizes, params, microbatches)
    seconds = {
        "compute": (flops * (1 + again) * ticks + orthogonal) / (peak * UTILISATION["compute"]),
        "memory": moved / (kind.bandwidth * UTILISATION["memory"]),
        "network": network_seconds(traffic, kind),
    }
    return Estimate(memory, traffic, seconds, attention)


def estimate_traffic(config: Config, sizes: dict[str, int], params: int, microbatches: int) -> dict[str, int]:
    """Bytes that a device sends in a step, in rings (see `collectives.count_bytes`), by the kind of collective.

    `params` are the bytes of the parameters on a device. All but the optimizer's is repeated for each microbatch
    of the accumulation, if the devices share more than the batch.
    """
    model, training = config.model, config.training
    rows = training.batch_size
    assert isinstance(rows, int)
    fsdp, tensor, context, stages = (sizes[axis] for axis in ("fsdp", "tensor", "context", "pipeline"))
    again = remat_policy(config) == "full"
    layers, item = model.n_layers / stages, jnp.dtype(training.precision).itemsize
    stream = rows * model.max_seq_length / context * model.n_embd * item  # activations between two layers

    # A pipeline gathers its weights, and sums their gradients, in each of its ticks.
    turns = microbatches + stages - 1 if stages > 1 else 1

    def ring(parts: int) -> float:
        return (parts - 1) / parts

    # The blocks' weights travel in the compute type, their gradients and the tables in float32.
    table = 4 * model.padded_vocab_size * model.n_embd / (fsdp * tensor * stages)
    table *= 1 if model.tie_embeddings else 2
    gradients = params - table
    weights = gradients * item / 4
    copies = sizes["data"] * context
    keys = 2 * stream * model.kv_heads / model.n_heads * context / tensor * ring(context)
    reduced = 2 * (turns * gradients + table) * ring(copies) + (4 + 2 * again) * layers * 2 * stream * ring(tensor)
    # The lookup and the head, whose table is divided; and into a pipeline's first stage, and out of its last.
    reduced += 2 * 2 * stream * (ring(tensor) + 2 * ring(stages))
    sent = {
        "all-gather": (2 * turns * weights + table) * fsdp * ring(fsdp) + layers * keys * (1 + again),
        "reduce-scatter": (turns * gradients + table) * fsdp * ring(fsdp) + layers * keys,
        "all-reduce": reduced,
        "collective-permute": 2 * stream * turns / microbatches if stages > 1 else 0,
    }
    once = math.prod(sizes.values()) == sizes["data"]  # only gradients are summed, and when they are accumulated
    sent = {name: size * (1 if once else training.gradient_accumulation_steps) for name, size in sent.items()}
    if training.optimizer == "muon":  # from parts of each matrix to whole ones and back, an axis at a time
        sent["all-to-all"] = 2 * gradients * padding_ratio(model, sizes) * (ring(fsdp) + ring(tensor))
    return {name: int(size) for name, size in sent.items() if size}


def padding_ratio(model: ModelConfig, sizes: dict[str, int]) -> float:
    """The layers that devices orthogonalise in Muon, as many each, to those there are."""
    parts = math.prod(sizes[axis] for axis in RULES["matrices"] or ())
    return -(-model.n_layers // parts) * parts / model.n_layers
