"""The keys of a run: its length, its optimizer, and what it writes."""

import dataclasses
from typing import Literal

from l1_jax.config.key import MAX_BATCH, MAX_STEPS, key, when


@dataclasses.dataclass(frozen=True)
class TransferConfig:
    """Where a run's weights come from, where not from its seed."""

    from_: str | None = key(
        None,
        "a checkpoint, or a run, whose weights a new run starts with; all must match",
        resume="fatal",
        is_path=True,
    )
    freeze: tuple[str, ...] = key(
        (),
        "regular expressions: parameters in whose path one is found are not trained, as "
        "blocks\\.[01]\\. or token_embedding",
        resume="never",
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The run: its length, its optimizer, and what it writes."""

    num_epochs: float = key(
        3.0, "passes over the training split; max_steps wins over it", resume="free", gt=0.0
    )
    max_steps: int | None = key(
        None, "steps of the run; null follows num_epochs", resume="warned", ge=1, le=MAX_STEPS
    )
    schedule_steps: int | None = key(
        None,
        "horizon of the learning-rate schedule; null is the run's length",
        resume="warned",
        ge=1,
        le=MAX_STEPS,
    )
    batch_size: int | Literal["auto"] | None = key(
        None,
        "sequences per device (data x fsdp) and microbatch; null is 8 or derived; auto: the "
        "most that fit, "
        "needs global_batch_size",
        resume="free",
        ge=1,
        le=MAX_BATCH,
    )
    global_batch_size: int | None = key(
        None,
        "sequences per step; wins, and accumulation is derived",
        resume="free",
        ge=1,
        le=MAX_BATCH,
    )
    gradient_accumulation_steps: int = key(
        1, "microbatches per step", resume="free", ge=1, le=MAX_BATCH
    )
    learning_rate: float = key(5e-4, "peak learning rate", resume="warned", gt=0.0)
    min_learning_rate: float | None = key(
        None, "end of the schedule; null is a tenth of learning_rate", resume="warned", ge=0.0
    )
    warmup_steps: int | Literal["auto"] = key(
        "auto",
        "linear warm-up; auto: min(500, 10 % of the schedule)",
        resume="warned",
        ge=0,
        le=MAX_STEPS,
    )
    schedule: Literal["cosine", "wsd"] = key(
        "cosine",
        "after the warm-up a cosine, or a stable rate and then a linear decay",
        resume="warned",
    )
    decay_fraction: float = key(
        0.2,
        "share of the schedule in which wsd decays",
        resume="warned",
        used_with=when("training.schedule", "wsd"),
        gt=0.0,
        le=1.0,
    )
    optimizer: Literal["adamw", "adafactor", "lion", "muon"] = key(
        "adamw",
        "muon: for the matrices of the blocks, AdamW for the rest; adafactor keeps no first moment",
        resume="fatal",
    )
    muon_learning_rate: float = key(
        0.02,
        "peak rate of muon's matrices, on the schedule of learning_rate",
        resume="warned",
        used_with=when("training.optimizer", "muon"),
        gt=0.0,
    )
    moment_dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "type in which the first moment is kept",
        resume="fatal",
        used_with=when("training.optimizer", "adamw", "lion", "muon"),
    )
    weight_decay: float = key(
        0.01, "decoupled, on matrices and token embeddings only", resume="warned", ge=0.0
    )
    beta1: float = key(
        0.9,
        "AdamW's and Lion's decay of the first moment",
        resume="warned",
        used_with=when("training.optimizer", "adamw", "lion", "muon"),
        ge=0.0,
        lt=1.0,
    )
    beta2: float = key(
        0.999,
        "AdamW's decay of the second moment; Lion's of its only one",
        resume="warned",
        used_with=when("training.optimizer", "adamw", "lion", "muon"),
        ge=0.0,
        lt=1.0,
    )
    eps: float = key(
        1e-8,
        "AdamW's term in the denominator",
        resume="warned",
        used_with=when("training.optimizer", "adamw", "muon"),
        gt=0.0,
    )
    ema_decay: float | None = key(
        None,
        "of an exponential average of the weights, which is validated and used: what of it stays "
        "at a step, such as 0.999; null keeps none",
        resume="warned",
        gt=0.0,
        lt=1.0,
    )
    max_grad_norm: float | None = key(
        1.0, "global norm at which gradients are clipped; null never clips", resume="warned", gt=0.0
    )
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = key(
        "auto", "what to run on; auto takes the best present", resume="free"
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = key(
        "auto",
        "compute type; auto is bfloat16 on GPU and TPU, float32 on CPU; parameters stay float32",
        resume="warned",
    )
    attention: Literal["auto", "plain", "blocked", "cudnn", "splash"] = key(
        "auto",
        "auto: cudnn on GPU, splash on TPU, blocked on CPU where they can run, else plain; "
        "plain holds the scores "
        "of a whole layer, the others never all at once",
        resume="free",
    )
    fp16: bool = key(
        False, "the same as precision: float16, with dynamic loss scaling", resume="free"
    )
    on_nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "a loss or gradient that is not finite is never applied; then the run stops, or "
        "goes on without the batch",
        resume="warned",
    )
    on_spike: Literal["warn", "skip", "rewind"] = key(
        "warn",
        "a loss far above what was expected: warn of it, skip the update, or go back to the "
        "last save_steps checkpoint "
        "and on with the next batch",
        resume="warned",
    )
    spike_threshold: float = key(
        6.0,
        "mean absolute deviations above the running mean that make a spike",
        resume="warned",
        gt=0.0,
    )
    max_skipped_steps: int = key(
        10,
        "skipped steps in a row that stop the run",
        resume="warned",
        used_with=(
            when("training.on_nonfinite", "skip"),
            when("training.on_spike", "skip", "rewind"),
        ),
        ge=1,
    )
    deterministic: bool = key(
        False,
        "the same bits in every run on a GPU, at a cost in speed; on CPU they are anyway",
        resume="free",
    )
    gradient_checkpointing: bool | Literal["none", "full", "dots", "dots_no_batch"] = key(
        False,
        "what a block keeps for the backward pass, which makes the rest again: none all; "
        "dots (false) the outputs of "
        "matmuls with weights and of attention; dots_no_batch those of matmuls with "
        "weights; full (true) its input",
        resume="free",
    )
    eval_steps: int = key(500, "steps between validations", resume="warned", ge=1)
    eval_batches: int | None = key(
        None,
        "batches per validation; null is the whole validation split",
        resume="warned",
        is_of_measure=True,
        ge=1,
    )
    save_steps: int = key(1000, "steps between checkpoints", resume="free", ge=1)
    save_total_limit: int = key(
        3, "newest checkpoints that are kept, beside best_model", resume="free", ge=1
    )
    on_save_error: Literal["stop", "warn"] = key(
        "stop",
        "a checkpoint that cannot be written ends the run, or is warned of and the next one tried",
        resume="free",
    )
    logging_steps: int = key(10, "steps between logged rows", resume="free", ge=1)
    early_stopping_patience: int | None = key(
        None, "validations without improvement before the run stops", resume="warned", ge=1
    )
    output_dir: str = key(
        "checkpoints", "the run directory, or a URL for it", resume="free", is_path=True
    )
    grace_seconds: float = key(
        120.0,
        "from a signal to the end of the process, saved or not",
        resume="free",
        gt=0.0,
        le=1e6,
    )
    hang_timeout_seconds: float | None = key(
        1800.0,
        "what takes longer, and than 20 median steps, ends the process; null waits for ever",
        resume="free",
        gt=0.0,
        le=1e6,
    )
    seed: int = key(
        42, "of initial weights, data order and dropout", resume="fatal", ge=0, le=2**32 - 1
    )
    wandb_project: str | None = key(
        None, "Weights & Biases project; null does not report there", resume="free"
    )
    wandb_run_name: str | None = key(
        None,
        "name of the run in Weights & Biases; null lets W&B choose",
        resume="free",
        used_with=when("training.wandb_project"),
    )
