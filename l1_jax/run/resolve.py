"""From the config that the user wrote to one in which nothing is left to choose."""

from l1_jax.cli import log
from l1_jax.config import Config, TrainingConfig
from l1_jax.errors import UserError
from l1_jax.training.optimizer import resolve_warmup


def resolve(
    config: Config, *, vocab_size: int, num_rows: int, shards: int, platform: str, resumed_batch: int | None = None
) -> Config:
    """Fills in what depends on the data and the devices. Resolving twice changes nothing.

    Args:
        vocab_size: of the tokenizer.
        num_rows: sequences in the training split.
        shards: devices over which the batch is divided (data x fsdp).
        platform: `cpu`, `gpu` or `tpu`.
        resumed_batch: the global batch of the run that is resumed; it is kept, whatever the devices.

    Raises:
        UserError: the data does not fit the model, or the batch the devices.
    """
    if vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens, more than model.vocab_size {config.model.vocab_size}",
            f"Set model.vocab_size to {vocab_size} or more, or prepare the data with a smaller --vocab-size",
        )
    if vocab_size < config.model.vocab_size:
        log.info(
            "vocabulary: %d tokens, the tokenizer's (model.vocab_size %d is a ceiling)",
            vocab_size,
            config.model.vocab_size,
        )
    if num_rows == 0:
        raise UserError(
            f"the training split is shorter than one sequence of {config.model.max_seq_length} tokens",
            "Lower model.max_seq_length, or prepare more text",
        )
    training = config.training
    batch = _resolve_batch(training, shards, resumed_batch)
    total_steps = training.max_steps or max(1, -int(-training.num_epochs * num_rows // batch["global_batch_size"]))
    schedule_steps = training.schedule_steps or total_steps
    floor = training.min_learning_rate
    return config.replace("model", vocab_size=vocab_size).replace(
        "training",
        **batch,
        max_steps=total_steps,
        schedule_steps=schedule_steps,
        warmup_steps=resolve_warmup(training.warmup_steps, schedule_steps),
        min_learning_rate=training.learning_rate / 10 if floor is None else floor,
        precision=_resolve_precision(training, platform),
    )


def _resolve_precision(training: TrainingConfig, platform: str) -> str:
    if training.fp16:
        return "float16"
    if training.precision == "auto":
        return "float32" if platform == "cpu" else "bfloat16"
    return training.precision


def _resolve_batch(training: TrainingConfig, shards: int, resumed_batch: int | None) -> dict[str, int]:
    wanted = resumed_batch or training.global_batch_size
    if wanted is None:
        per_shard, accumulation = training.batch_size or 8, training.gradient_accumulation_steps
        return _batch(per_shard, accumulation, shards)
    if wanted % shards:
        raise UserError(
            f"the global batch of {wanted} sequences does not divide over {shards} devices (data x fsdp)",
            f"Set training.global_batch_size to {_nearest_multiple(wanted, shards)}, or use another number of devices",
        )
    rows = wanted // shards
    ceiling = training.batch_size or (8 if resumed_batch else rows)
    # The fewest equal microbatches that the ceiling allows; one row each always is.
    accumulation = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= ceiling)
    return _batch(rows // accumulation, accumulation, shards)


def _batch(per_shard: int, accumulation: int, shards: int) -> dict[str, int]:
    return {
        "batch_size": per_shard,
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": per_shard * accumulation * shards,
    }


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
