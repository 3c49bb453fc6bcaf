"""The schema of a run. A key is declared here and nowhere else: its type, default, limits and what it is for."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Literal

from l1_jax.errors import UserError

# The order is the order of the devices: neighbours differ in `tensor`, whose messages are the most urgent.
MESH_AXES = ("pipeline", "data", "fsdp", "context", "tensor")
MAX_STEPS, MAX_BATCH = 2**31 - 1, 2**22  # the counter of steps is an int32; sequences of a step


def key(default: Any, doc: str, *, is_path: bool = False, **limits: Any) -> Any:
    """A config key. `limits`: `ge`, `gt`, `le` and `lt`, named as in Python's `operator`."""
    metadata = {"doc": doc, "limits": limits, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of the network."""

    vocab_size: int = key(50257, "ceiling of the vocabulary; a smaller tokenizer is used as it is", ge=1, le=2**24)
    max_seq_length: int = key(1024, "context length in tokens", ge=1, le=2**24)
    n_layers: int = key(12, "transformer blocks", ge=1, le=2**16)
    n_heads: int = key(12, "attention heads per block", ge=1, le=2**16)
    n_embd: int = key(768, "model width", ge=1, le=2**20)
    n_kv_heads: int | None = key(
        None, "heads of keys and values, each for a group of n_heads; null is n_heads", ge=1, le=2**16
    )
    n_inner: int | None = key(
        None, "hidden width of the MLP; null is 4 x n_embd, with swiglu 8/3 of it in multiples of 64", ge=1, le=2**22
    )
    dropout: float = key(0.1, "rate on embeddings, attention weights and residual branches", ge=0.0, lt=1.0)
    position_embedding: Literal["learned", "rope"] = key(
        "learned", "positions as vectors added to the tokens, or as rotations of queries and keys"
    )
    rope_theta: float = key(10000.0, "rope's slowest wavelength is 2 pi times nearly this many positions", gt=1.0)
    norm: Literal["layernorm", "rmsnorm"] = key("layernorm", "norm before attention, MLP and head")
    layer_norm_epsilon: float = key(1e-5, "added to the variance, or the mean square, in norms", gt=0.0)
    qk_norm: bool = key(False, "RMSNorm over each head of queries and keys")
    activation: Literal["gelu", "relu_squared", "swiglu"] = key("gelu", "of the MLP; swiglu has a third matrix")
    bias: bool = key(True, "linear maps add a bias")
    tie_embeddings: bool = key(True, "the head is the table of token embeddings, or one of its own that starts at 0")
    logit_softcap: float | None = key(None, "logits are softcap x tanh(logits / softcap); null leaves them", gt=0.0)
    zero_init_projections: bool = key(False, "output projections of attention and MLP start at 0")
    initializer_range: float = key(0.02, "standard deviation of the initial weights", gt=0.0)
    scan_layers: bool = key(True, "one compiled block scanned over depth (compiles fast) or a loop over the blocks")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: matrix units like round sizes."""
        return -(-self.vocab_size // 128) * 128

    @property
    def hidden_size(self) -> int:
        gated = -(-8 * self.n_embd // (3 * 64)) * 64  # three matrices as large as the two of 4 x n_embd
        return self.n_inner or (gated if self.activation == "swiglu" else 4 * self.n_embd)

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = key("data/processed", "directory, or URL of one, written by scripts/prepare_data.py", is_path=True)
    document_mask: bool = key(False, "attention and positions stay inside a document")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run: its length, its optimizer, and what it writes."""

    num_epochs: float = key(3.0, "passes over the training split; max_steps wins over it", gt=0.0)
    max_steps: int | None = key(None, "steps of the run; null follows num_epochs", ge=1, le=MAX_STEPS)
    schedule_steps: int | None = key(
        None, "horizon of the learning-rate schedule; null is the run's length", ge=1, le=MAX_STEPS
    )
    batch_size: int | Literal["auto"] | None = key(
        None,
        "sequences per device (data x fsdp) and microbatch; null is 8 or derived; auto: the most that fit, "
        "needs global_batch_size",
        ge=1,
        le=MAX_BATCH,
    )
    global_batch_size: int | None = key(
        None, "sequences per step; wins, and accumulation is derived", ge=1, le=MAX_BATCH
    )
    gradient_accumulation_steps: int = key(1, "microbatches per step", ge=1, le=MAX_BATCH)
    learning_rate: float = key(5e-4, "peak learning rate", gt=0.0)
    min_learning_rate: float | None = key(None, "end of the schedule; null is a tenth of learning_rate", ge=0.0)
    warmup_steps: int | Literal["auto"] = key(
        "auto", "linear warm-up; auto: min(500, 10 % of the schedule)", ge=0, le=MAX_STEPS
    )
    schedule: Literal["cosine", "wsd"] = key(
        "cosine", "after the warm-up a cosine, or a stable rate and then a linear decay"
    )
    decay_fraction: float = key(0.2, "share of the schedule in which wsd decays", gt=0.0, le=1.0)
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = key(
        "adamw", "muon: for the matrices of the blocks, AdamW for the rest; adafactor keeps no first moment"
    )
    muon_learning_rate: float = key(0.02, "peak rate of muon's matrices, on the schedule of learning_rate", gt=0.0)
    moment_dtype: Literal["float32", "bfloat16"] = key("float32", "type in which the first moment is kept")
    weight_decay: float = key(0.01, "decoupled, on matrices and token embeddings only", ge=0.0)
    beta1: float = key(0.9, "AdamW's and Lion's decay of the first moment", ge=0.0, lt=1.0)
    beta2: float = key(0.999, "AdamW's decay of the second moment; Lion's of its only one", ge=0.0, lt=1.0)
    eps: float = key(1e-8, "AdamW's term in the denominator", gt=0.0)
    max_grad_norm: float | None = key(1.0, "global norm at which gradients are clipped; null never clips", gt=0.0)
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = key("auto", "what to run on; auto takes the best present")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto", "compute type; auto is bfloat16 on GPU and TPU, float32 on CPU; parameters stay float32"
    )
    attention: Literal["auto", "plain", "blocked", "cudnn", "splash"] = key(
        "auto",
        "auto: cudnn on GPU, splash on TPU, blocked on CPU where they can run, else plain; plain holds the scores "
        "of a whole layer, the others never all at once",
    )
    fp16: bool = key(False, "the same as precision: float16, with dynamic loss scaling")
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "a loss or gradient that is not finite is never applied; then the run stops, or goes on without the batch",
    )
    on_spike: Literal["warn", "skip", "rewind"] = key(
        "warn",
        "a loss far above what was expected: warn of it, skip the update, or go back to the last save_steps checkpoint "
        "and on with the next batch",
    )
    spike_threshold: float = key(6.0, "mean absolute deviations above the running mean that make a spike", gt=0.0)
    max_skipped_steps: int = key(10, "skipped steps in a row that stop the run", ge=1)
    deterministic: bool = key(False, "the same bits in every run on a GPU, at a cost in speed; on CPU they are anyway")
    gradient_checkpointing: bool | Literal["none", "full", "dots", "dots_no_batch"] = key(
        False,
        "what a block keeps for the backward pass, which makes the rest again: none all; dots (false) the outputs of "
        "matmuls with weights and of attention; dots_no_batch those of matmuls with weights; full (true) its input",
    )
    eval_steps: int = key(500, "steps between validations", ge=1)
    eval_batches: int | None = key(None, "batches per validation; null is the whole validation split", ge=1)
    save_steps: int = key(1000, "steps between checkpoints", ge=1)
    save_total_limit: int = key(3, "newest checkpoints that are kept, beside best_model", ge=1)
    on_save_error: Literal["stop", "warn"] = key(
        "stop", "a checkpoint that cannot be written ends the run, or is warned of and the next one tried"
    )
    logging_steps: int = key(10, "steps between logged rows", ge=1)
    early_stopping_patience: int | None = key(None, "validations without improvement before the run stops", ge=1)
    output_dir: str = key("checkpoints", "the run directory, or a URL for it", is_path=True)
    grace_seconds: float = key(120.0, "from a signal to the end of the process, saved or not", gt=0.0, le=1e6)
    hang_timeout_seconds: float | None = key(
        1800.0, "what takes longer, and than 20 median steps, ends the process; null waits for ever", gt=0.0, le=1e6
    )
    seed: int = key(42, "of initial weights, data order and dropout", ge=0, le=2**32 - 1)
    wandb_project: str | None = key(None, "Weights & Biases project; null does not report there")
    wandb_run_name: str | None = key(None, "name of the run in Weights & Biases; null lets W&B choose")


@dataclasses.dataclass(frozen=True)
class ParallelismConfig:
    """Devices along each mesh axis, `MESH_AXES`; at most one may be -1, the rest of the devices."""

    data: int = key(-1, "copies of the model, each with its own part of the batch", ge=-1)
    fsdp: int = key(1, "shards of parameters and optimizer state, each with its own part of the batch", ge=-1)
    tensor: int = key(1, "shards of heads, MLP hidden units and vocabulary", ge=-1)
    context: int = key(1, "parts of the sequence", ge=-1)
    pipeline: int = key(1, "stages of the layers, through which microbatches pass", ge=-1)
    pipeline_microbatches: int | None = key(
        None, "microbatches in the pipeline; null is as many as divide batch_size, up to 4 a stage", ge=1, le=MAX_BATCH
    )


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults of scripts/generate.py; its flags win."""

    temperature: float = key(1.0, "divides the logits; 0 is greedy", ge=0.0)
    top_k: int | None = key(None, "sample among the k most likely tokens", ge=1)
    top_p: float | None = key(None, "sample among the fewest tokens whose probabilities sum to p", gt=0.0, le=1.0)
    min_p: float | None = key(None, "drop tokens less likely than this share of the likeliest", ge=0.0, le=1.0)
    repetition_penalty: float = key(1.0, "above 1, tokens already there become less likely", gt=0.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    parallelism: ParallelismConfig = ParallelismConfig()
    generation: GenerationConfig = GenerationConfig()

    def replace(self, section: str, **values: Any) -> "Config":
        """A copy with some keys of one section changed."""
        return dataclasses.replace(self, **{section: dataclasses.replace(getattr(self, section), **values)})


def _is_path(text: str) -> bool:
    """Whether the system would take `text` for a path: NUL and halves of surrogate pairs are in none."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def contradictions(config: Config) -> Iterator[UserError]:
    """Yields an error for every pair of keys that do not go together."""
    model, training = config.model, config.training
    mesh = {axis: getattr(config.parallelism, axis) for axis in MESH_AXES}
    if model.n_embd % model.n_heads:
        fits = max(heads for heads in range(1, min(model.n_heads, model.n_embd + 1)) if model.n_embd % heads == 0)
        what = f"model.n_embd {model.n_embd} is not divisible by model.n_heads {model.n_heads}"
        yield UserError(what, f"Set model.n_heads to {fits}, or model.n_embd to a multiple of {model.n_heads}")
    if model.n_heads % model.kv_heads:
        fits = max(heads for heads in range(1, min(model.kv_heads, model.n_heads) + 1) if model.n_heads % heads == 0)
        what = f"model.n_heads {model.n_heads} is not divisible by model.n_kv_heads {model.n_kv_heads}"
        yield UserError(what, f"Set model.n_kv_heads to {fits}")
    elif model.position_embedding == "rope" and (model.n_embd // model.n_heads) % 2:
        what = (
            f"model.position_embedding is rope, which turns pairs, and a head has {model.n_embd // model.n_heads} dims"
        )
        yield UserError(what, "Choose model.n_embd and model.n_heads so that the size of a head is even")
    if training.optimizer == "adafactor" and training.moment_dtype != "float32":
        what = f"training.moment_dtype is {training.moment_dtype}, and adafactor keeps no first moment"
        yield UserError(what, "Remove training.moment_dtype")
    for name, directory in (("data.path", config.data.path), ("training.output_dir", training.output_dir)):
        if not directory:
            yield UserError(f"{name} is empty", "Give a directory")
        elif not _is_path(directory):
            yield UserError(f"{name} is {directory[:60]!a}, which no file can be called", "Give a directory")
    if training.batch_size == "auto" and training.global_batch_size is None:
        what = "training.batch_size is auto, and training.global_batch_size is not set"
        yield UserError(
            what, "Set training.global_batch_size: what a run computes must not depend on the device's memory"
        )
    if training.fp16 and training.precision not in ("auto", "float16"):
        what = f"training.fp16 is true and training.precision is {training.precision!r}"
        yield UserError(what, "Keep one of the two: fp16: true means precision: float16")
    if (floor := training.min_learning_rate) is not None and floor > training.learning_rate:
        what = f"training.min_learning_rate {floor} is above training.learning_rate {training.learning_rate}"
        yield UserError(what, "Lower training.min_learning_rate")
    for axis in (axis for axis, size in mesh.items() if size == 0):
        yield UserError(f"parallelism.{axis} is 0", "Set it to 1 or more, or to -1 for the rest of the devices")
    rest = [axis for axis, size in mesh.items() if size == -1]
    if len(rest) > 1:
        remedy = "Set parallelism.data to 1: it is -1 where it is not set" if "data" in rest else "Leave -1 to one axis"
        yield UserError(f"parallelism has more than one -1 ({', '.join(rest)})", remedy)
