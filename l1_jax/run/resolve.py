"""What a config leaves open and the data and the devices decide: batch, steps, precision, vocabulary."""

import math
from fractions import Fraction

from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.key import MAX_BATCH, MAX_STEPS
from l1_jax.config.schema import Config
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.parallel.layout import Layout
from l1_jax.training.schedule import check_decay, resolve_warmup
from l1_jax.training.section import TrainingConfig


def resolve(
    config: Config, vocab_size: int, num_tokens: int, mesh: Mesh | AbstractMesh, resumed_batch: int | None
) -> Config:
    """Fills in what depends on the data and the devices. Resolving twice changes nothing.

    `vocab_size` is the tokenizer's, `num_tokens` the length of the training stream; `resumed_batch`, the global batch
    of the run that is resumed, is kept. UserError where the data does not fit the model, or the batch the devices.
    """
    model, training = config.model, config.training
    if vocab_size > model.vocab_size:
        what = f"the tokenizer has {vocab_size} tokens, more than model.vocab_size {model.vocab_size}"
        raise UserError(what, f"Set model.vocab_size to {vocab_size}, or prepare the data with a smaller --vocab-size")
    if vocab_size < model.vocab_size:
        log.info("vocabulary: %d tokens (model.vocab_size %d is a ceiling)", vocab_size, model.vocab_size)
    if not (num_rows := (num_tokens - 1) // model.max_seq_length):
        what = f"the training split is shorter than one sequence of {model.max_seq_length} tokens"
        raise UserError(what, "Lower model.max_seq_length, or prepare more text")
    batch = resolve_batch(training, Layout.of(mesh).rows, resumed_batch)
    total_steps = training.max_steps or steps_of(training.num_epochs, num_rows, batch["global_batch_size"])
    if total_steps > MAX_STEPS:
        what = f"training.num_epochs {training.num_epochs} is {total_steps} steps, and {MAX_STEPS} is the most"
        raise UserError(what, "Lower training.num_epochs")
    schedule_steps = training.schedule_steps or total_steps
    if total_steps > schedule_steps:
        log.warning("past training.schedule_steps %d the learning rate stays at its floor", schedule_steps)
    if batch["global_batch_size"] > num_rows:
        _warn_of_large_batch(batch["global_batch_size"], num_rows, model.max_seq_length, schedule_steps)
    warmup_steps = resolve_warmup(training.warmup_steps, schedule_steps)
    steps = {"max_steps": total_steps, "schedule_steps": schedule_steps, "warmup_steps": warmup_steps}
    floor = training.learning_rate / 10 if training.min_learning_rate is None else training.min_learning_rate
    precision = "float16" if training.fp16 else training.precision
    if precision == "auto":
        precision = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    layout = Layout.of(mesh, batch["batch_size"], config.parallelism.pipeline_microbatches)
    config = config.replace("parallelism", pipeline_microbatches=layout.microbatches)
    config = config.replace("training", **batch, **steps, min_learning_rate=floor, precision=precision)
    check_decay(config.training)
    return config.replace("model", vocab_size=vocab_size, n_inner=model.hidden_size)


def steps_of(num_epochs: float, num_rows: int, global_batch_size: int) -> int:
    """The fewest steps that are `num_epochs` passes over the training split, of `num_rows` sequences."""
    # As an exact decimal: 1.1 x 800 as floats is above 880, and would be a step too many of 8 sequences.
    return max(1, math.ceil(Fraction(str(num_epochs)) * num_rows / global_batch_size))


def _warn_of_large_batch(global_batch_size: int, num_rows: int, length: int, schedule_steps: int) -> None:
    floor = f"the last of {schedule_steps} steps is" if schedule_steps > 1 else "the only step is"
    log.warning(
        "a step is %.3g epochs: the global batch is %d sequences, and the training split %d of %d tokens; "
        "%s at the floor of the schedule. Lower training.batch_size (or training.global_batch_size) or "
        "model.max_seq_length, or prepare more text",
        global_batch_size / num_rows, global_batch_size, num_rows, length, floor,
    )  # fmt: skip


def resolve_batch(training: TrainingConfig, shards: int, resumed_batch: int | None) -> dict[str, int]:
    """`batch_size` (per shard and microbatch), `gradient_accumulation_steps` and `global_batch_size`, their product.
    Where `batch_size` is auto, the planner has replaced it."""
    assert training.batch_size != "auto"
    wanted = resumed_batch or training.global_batch_size
    asked = training.global_batch_size or (training.batch_size or 8) * training.gradient_accumulation_steps * shards
    if resumed_batch not in (None, asked):
        log.warning("the global batch stays %d, that of the run that is resumed; asked for: %d", resumed_batch, asked)
    if wanted is None:
        per_shard, accumulation = training.batch_size or 8, training.gradient_accumulation_steps
    elif wanted % shards:
        near = max(1, round(wanted / shards)) * shards
        what = f"the global batch of {wanted} sequences does not divide over {shards} devices (data x fsdp)"
        fewer = max(n for n in range(1, shards) if wanted % n == 0)
        fit = f"Have {fewer} of them: with other devices, or some of these for parallelism.tensor or another axis"
        remedy = fit if resumed_batch else f"Set training.global_batch_size to {near}"
        raise UserError(what, remedy)
    else:
        rows = wanted // shards
        ceiling = training.batch_size or (rows if training.global_batch_size else 8)
        # The fewest equal microbatches that the ceiling allows; one row each always is allowed.
        accumulation = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= ceiling)
        per_shard = rows // accumulation
    batch = per_shard * accumulation * shards
    if batch > MAX_BATCH:
        what = f"{per_shard} sequences x {accumulation} microbatches x {shards} devices is {batch}, above {MAX_BATCH}"
        raise UserError(what, "Lower training.batch_size or training.gradient_accumulation_steps")
    return {"batch_size": per_shard, "gradient_accumulation_steps": accumulation, "global_batch_size": batch}
