"""The keys of a run: its length, its optimizer, and what it writes."""

import dataclasses
from typing import Literal

from l1_jax.config.key import MAX_BATCH, MAX_STEPS, key


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
