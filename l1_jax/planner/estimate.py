"""Memory, traffic and time of a train step by formula, for any device.

docs/planning.md has the formulas in words.

Legend: B batch, T length, D model width, V vocabulary (padded), L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import Resolved
from l1_jax.devices.kinds import DeviceKind
from l1_jax.model.backends import choose_attention
from l1_jax.model.flops import flops_per_token
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.chunks import choose_num_chunks
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import RULES
from l1_jax.planner.state_size import StateSize, state_bytes
from l1_jax.training.program import remat_policy

# What a good run reaches of the data sheet's figures: assumed, not measured.
UTILISATION = {"compute": 0.5, "memory": 0.8, "network": 0.7}

# What a formula says must leave this share of the memory free, for what it does not know.
RESERVE = 0.08


class WorkingSet(NamedTuple):
    """What a layer's backward pass holds at once, as a share of what the layer could keep."""

    without_remat: float
    with_remat: float


# By the way of attention. Blocks of scores are not kept, and come on top. Held against the GPU
# compiler's figures (docs/planning.md).
WORKING_SET = {
    "plain": WorkingSet(without_remat=0.33, with_remat=0.75),
    "blocked": WorkingSet(without_remat=1.5, with_remat=2.0),
}


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
    """The time in which a device sends this traffic."""
    return sum(traffic.values()) / (kind.link * UTILISATION["network"])


def usable_by_formula(limit: int) -> int:
    """The part of `limit` that an estimate may fill."""
    return int(limit * (1 - RESERVE))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that a forward pass keeps for the backward pass, per row of the batch and all
    layers."""

    split: int  # of arrays that the tensor axis divides: heads and hidden units
    whole: int  # of all others
    keys: int  # of keys and values, which the context axis gathers (a part of `split`)


@functools.cache
def kept_bytes(model: ModelConfig, dtype: str, remat: str, attention: str = "plain") -> Kept:
    """What jax keeps of the real model, by the shapes of the residuals of `jax.vjp`.

    So there is no formula to fall out of date.

    Args:
        model: of which the hidden width may be changed on the way.
        dtype: the compute type.
        remat: the policy of what is recomputed.
        attention: the way of attention.
    """
    # A layer's arrays are told by their dims, so the hidden width must not be the model's. Where it
    # is, twice as much is looked at, and half of that is counted.
    hidden = model.hidden_size
    if hidden == model.n_embd:
        hidden = 2 * model.n_embd
    counted = model.hidden_size / hidden
    model = dataclasses.replace(model, scan_layers=True, n_inner=hidden)
    graphdef, initialise, _ = build(model, jnp.dtype(dtype), remat, attention=attention)

    split = 0
    whole = 0
    of_one_row = _residuals(model, graphdef, initialise, rows=1)
    of_two_rows = _residuals(model, graphdef, initialise, rows=2)
    for one, two in zip(of_one_row, of_two_rows, strict=True):
        # What does not grow with the rows are weights.
        size = (two.size - one.size) * one.dtype.itemsize
        is_hidden = len(one.shape) == 4 and one.shape[-1] == hidden  # [L, B, T, hidden]
        has_heads = len(one.shape) >= 5  # [L, B, T, heads, head size]

        if is_hidden:
            split += int(size * counted)
        elif has_heads:
            split += size
        else:
            whole += size

    keys = 0
    if remat != "full":
        head_size = model.head_dims
        keys_and_values = 2 * model.n_layers * model.max_seq_length * model.kv_heads * head_size
        keys = keys_and_values * jnp.dtype(dtype).itemsize
    return Kept(split=split, whole=whole, keys=keys)


def _residuals(
    model: ModelConfig, graphdef: nnx.GraphDef, initialise: Callable[..., Any], *, rows: int
) -> list[Any]:
    """The shapes of what the backward pass of `rows` rows needs; nothing is computed."""
    params = jax.eval_shape(initialise, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((rows, model.max_seq_length), jnp.int32)
    dropout_keys = None
    if model.drops:
        dropout_keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))

    def backward(params: Any, tokens: Any, dropout_keys: Any) -> Any:
        def forward(params: Any) -> Any:
            network = nnx.merge(graphdef, params)
            return network(tokens, dropout_keys_B=dropout_keys).hidden

        return jax.vjp(forward, params)[1]

    # A mesh of one device, also inside a run's mesh.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return jax.tree.leaves(jax.eval_shape(backward, params, tokens, dropout_keys))


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the formulas need to know of a step."""

    model: ModelConfig
    precision: str  # the compute type
    remat: str  # the policy of what is recomputed
    backend: str  # "plain" or "blocked": which keeps what the devices' own kernels keep
    rows: int  # of a microbatch on a device
    accumulation: int  # microbatches of a step
    microbatches: int  # parts of one of those, in a pipeline
    sizes: dict[str, int]  # devices along each mesh axis
    state: StateSize

    @property
    def item_bytes(self) -> int:
        return jnp.dtype(self.precision).itemsize

    @property
    def length(self) -> int:
        """Tokens of a row on a device."""
        return self.model.max_seq_length // self.sizes["context"]

    @property
    def head_positions(self) -> int:
        """Tokens of a row whose logits are there at once."""
        vocab_size = self.model.padded_vocab_size
        chunks = choose_num_chunks(self.rows, self.length, vocab_size)
        return -(-self.length // chunks)

    @property
    def logits(self) -> float:
        """Bytes of the logits that are there at once: float32, gradient, compute type."""
        num_logits = 10 * self.rows * self.head_positions * self.model.padded_vocab_size
        return num_logits / (self.sizes["tensor"] * self.sizes["pipeline"])

    @property
    def ticks(self) -> float:
        """Ticks of a pipeline to those with work: it keeps and does something in idle ones too."""
        stages = self.sizes["pipeline"]
        return (self.microbatches + stages - 1) / self.microbatches

    @property
    def backward_share(self) -> float:
        """The share of the layers that have a backward pass."""
        return 1 - self.state.frozen.layers / self.model.n_layers

    def kept(self, remat: str) -> float:
        """Bytes that the forward pass of one microbatch keeps under a policy."""
        tensor = self.sizes["tensor"]
        context = self.sizes["context"]
        stages = self.sizes["pipeline"]

        each = kept_bytes(self.model, self.precision, remat, self.backend)
        gathered = each.keys * (1 - 1 / context)
        of_a_row = (each.split / context + gathered) / tensor + each.whole / context
        return self.rows * of_a_row * self.ticks / stages


def estimate(
    config: Resolved, mesh: Mesh | AbstractMesh, kind: DeviceKind | None = None
) -> Estimate:
    """Memory, traffic and time of a step.

    Args:
        config: resolved; fits `mesh`.
        mesh: of any devices; an abstract one will do.
        kind: of the devices. Without it all times are 0.

    Raises:
        UserError: `training.attention` cannot run there.
    """
    training = config.training
    rows = training.batch_size
    assert isinstance(rows, int)
    state = state_bytes(config, mesh)
    layout = Layout.of(mesh, rows, config.parallelism.pipeline_microbatches)

    platform = None
    if kind is not None:
        platform = "tpu" if kind.is_tpu else "gpu"
    attention = choose_attention(config, mesh, config.model.attention_rate, platform).name

    step = _Step(
        model=config.model,
        precision=training.precision,
        remat=remat_policy(config),
        backend="plain" if attention == "plain" else "blocked",
        rows=rows,
        accumulation=training.gradient_accumulation_steps,
        microbatches=layout.microbatches,
        sizes=dict(mesh.shape),
        state=state,
    )
    memory = _memory(step)
    if kind is None:
        no_time = dict.fromkeys(("compute", "memory", "network"), 0.0)
        return Estimate(memory=memory, traffic={}, seconds=no_time, attention=attention)

    traffic = estimate_traffic(config, step.sizes, state, step.microbatches)
    seconds = {
        "compute": _compute_seconds(step, kind),
        "memory": _moved_bytes(step) / (kind.bandwidth * UTILISATION["memory"]),
        "network": network_seconds(traffic, kind),
    }
    return Estimate(memory=memory, traffic=traffic, seconds=seconds, attention=attention)


def _memory(step: _Step) -> dict[str, int]:
    """Bytes on a device at the fullest moment, by what they hold."""
    model = step.model
    params = step.state.params
    fsdp = step.sizes["fsdp"]
    stages = step.sizes["pipeline"]

    # What one layer's backward pass works on takes the place of the logits, which are gone by then.
    working_set = WORKING_SET[step.backend]
    share = working_set.without_remat if step.remat == "none" else working_set.with_remat
    layer = step.kept("none") / (model.n_layers / stages) / step.ticks / step.microbatches
    temporaries = max(layer * share - step.logits, 0)

    # fsdp gathers a layer and the table.
    if fsdp > 1:
        temporaries += 2 * step.state.unpacked * fsdp / model.n_layers * stages
        temporaries += _table_bytes(model) / (step.sizes["tensor"] * stages)

    return {
        "parameters": params,
        "optimizer": step.state.state - params,
        "gradients": step.state.trained * (2 if step.accumulation > 1 else 1),
        "activations": int(step.kept(step.remat) * step.backward_share),
        "logits": int(step.logits),
        "temporaries": int(temporaries),
    }


def _table_bytes(model: ModelConfig) -> int:
    """Bytes of the embedding of the vocabulary, `[V, D]` in float32."""
    return 4 * model.padded_vocab_size * model.n_embd


def _compute_seconds(step: _Step, kind: DeviceKind) -> float:
    """The time in which a device does the products of a step."""
    model = step.model
    tensor = step.sizes["tensor"]
    stages = step.sizes["pipeline"]
    frozen = step.state.frozen
    per_token = flops_per_token(step.state.num_parameters, model, frozen)

    # The forward pass is a third of a step in which all is trained, and the scores are half of
    # attention. What has no backward pass is not computed again.
    all_trained = flops_per_token(step.state.num_parameters, model)
    heads_width = model.n_heads * model.head_dims
    attention = 12 * model.n_layers * heads_width * model.max_seq_length
    recomputed = {
        "none": 0.0,
        "dots": attention / 6,
        "dots_no_batch": attention / 3,
        "full": all_trained / 3,
    }[step.remat]
    computed = per_token + recomputed * step.backward_share

    num_tokens = step.rows * step.accumulation * step.length
    flops = num_tokens * computed * step.ticks / (tensor * stages)

    optimizer_flops = step.state.optimizer_flops * padding_ratio(model, step.sizes)
    optimizer_flops /= step.sizes["fsdp"] * tensor * stages

    # float32 runs as TF32, half as fast, on a GPU; a TPU rounds to bfloat16. The optimizer's
    # products are float32 beside any compute type.
    peak = kind.peak_flops
    if not kind.is_tpu:
        if step.item_bytes == 4:
            peak /= 2
        else:
            optimizer_flops *= 2

    return (flops + optimizer_flops) / (peak * UTILISATION["compute"])


def _moved_bytes(step: _Step) -> float:
    """Bytes between a device and its memory in a step."""
    weights = 3 * step.state.params * step.sizes["fsdp"]

    # What a layer keeps is written and read, and its gradients too, and what is recomputed is
    # written once more.
    activations = 4 * step.kept("none") if step.remat == "none" else 5 * step.kept("dots")

    logits = 3 * step.logits * step.length / step.head_positions
    microbatch = weights + activations * step.backward_share + logits

    # The optimizer reads parameters, gradients and moments and writes as much; not what is frozen.
    frozen = step.state.params - step.state.trained
    optimizer = 2 * (step.state.trained + step.state.state - frozen)
    return step.accumulation * microbatch + optimizer


def estimate_traffic(
    config: Resolved, sizes: dict[str, int], state: StateSize, microbatches: int
) -> dict[str, int]:
    """Bytes that a device sends in a step, in rings (see `collectives.count_bytes`).

    All but the optimizer's is repeated for each microbatch of the accumulation, if the devices
    share more than the batch.

    Args:
        config: resolved.
        sizes: devices along each mesh axis.
        state: on a device.
        microbatches: parts of a microbatch, in a pipeline.

    Returns:
        Bytes by the kind of collective; those that send nothing are left out.
    """
    model = config.model
    training = config.training
    rows = training.batch_size
    assert isinstance(rows, int)

    fsdp = sizes["fsdp"]
    tensor = sizes["tensor"]
    context = sizes["context"]
    stages = sizes["pipeline"]
    copies = sizes["data"] * context  # of each parameter

    item_bytes = jnp.dtype(training.precision).itemsize
    layers = model.n_layers / stages
    again = 1 if remat_policy(config) == "full" else 0  # forward passes beside the first one

    def ring(parts: int) -> float:
        return (parts - 1) / parts

    # A pipeline gathers its weights, and sums their gradients, in each of its ticks.
    turns = microbatches + stages - 1 if stages > 1 else 1

    # The blocks' weights travel in the compute type, their gradients and the tables in float32.
    # What is frozen has no gradient; its share is taken for the same in blocks and tables.
    table = _table_bytes(model) / (fsdp * tensor * stages)
    table *= 1 if model.tie_embeddings else 2
    blocks = state.unpacked - table
    weights = blocks * item_bytes / 4
    trained_share = state.trained / state.unpacked
    gradients = trained_share * (turns * blocks + table)

    # The activations between two layers, and the keys and values that the context axis gathers.
    stream = rows * model.max_seq_length / context * model.n_embd * item_bytes
    kv_share = model.kv_heads * model.head_dims / model.n_embd
    keys = 2 * stream * kv_share * context / tensor * ring(context)

    gathered_weights = (2 * turns * weights + table) * fsdp * ring(fsdp)
    scattered_gradients = gradients * fsdp * ring(fsdp)

    summed_gradients = 2 * gradients * ring(copies)
    summed_in_layers = (4 + 2 * again) * layers * 2 * stream * ring(tensor)
    # The lookup and the head, whose table is divided; and into a pipeline's first stage, and out of
    # its last.
    summed_at_ends = 2 * 2 * stream * (ring(tensor) + 2 * ring(stages))

    sent: dict[str, float] = {
        "all-gather": gathered_weights + layers * keys * (1 + again),
        "reduce-scatter": scattered_gradients + layers * keys,
        "all-reduce": summed_gradients + summed_in_layers + summed_at_ends,
        "collective-permute": 2 * stream * turns / microbatches if stages > 1 else 0,
    }

    # Over data alone only gradients are summed, and when they are accumulated.
    is_data_alone = math.prod(sizes.values()) == sizes["data"]
    if not is_data_alone:
        for kind in sent:
            sent[kind] *= training.gradient_accumulation_steps

    # From parts of each matrix to whole ones and back, an axis at a time.
    if training.optimizer == "muon":
        exchanged = 2 * trained_share * blocks * padding_ratio(model, sizes)
        sent["all-to-all"] = exchanged * (ring(fsdp) + ring(tensor))

    return {kind: int(size) for kind, size in sent.items() if size}


def padding_ratio(model: ModelConfig, sizes: dict[str, int]) -> float:
    """The layers that devices orthogonalise in Muon, as many each, to those there are."""
    parts = math.prod(sizes[axis] for axis in RULES["matrices"] or ())
    padded_layers = -(-model.n_layers // parts) * parts
    return padded_layers / model.n_layers
