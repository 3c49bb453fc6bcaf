"""Config -> Resolved: what a config leaves open, decided by the data and the devices."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeVar

from l1_jax.config.key import MAX_BATCH, MAX_STEPS
from l1_jax.config.schema import Config, largest_divisor
from l1_jax.config.stages import Stage, Stages, steps_of_epochs
from l1_jax.console import log
from l1_jax.errors import UserError
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.section import ParallelismConfig
from l1_jax.training.section import TrainingConfig

DEFAULT_BATCH_SIZE = 8  # sequences per device and microbatch
WARMUP_STEPS = 500  # the most that `auto` means

# So many microbatches keep a pipeline's bubble below a fifth of the time.
MICROBATCHES_PER_STAGE = 4

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
    """`vocab_size` is the tokenizer's here."""

    n_inner: int
    n_kv_heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedTraining(TrainingConfig):
    max_steps: int
    schedule_steps: int
    warmup_steps: int
    batch_size: int
    global_batch_size: int
    min_learning_rate: float
    precision: Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedParallelism(ParallelismConfig):
    pipeline_microbatches: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved(Config):
    """A run as it is computed: nothing is left to be derived.

    `training.device` and `training.attention` stay requests, for each start asks them of the
    machine that it runs on; the sizes of the mesh are those of the mesh itself. A null
    `model.head_size` or `model.attention_dropout` stays too: whoever overrides the width or
    `model.dropout` on top of what a run wrote means both.
    """

    model: ResolvedModel
    training: ResolvedTraining
    parallelism: ResolvedParallelism


class Batch(NamedTuple):
    """How the sequences of a step are divided; `global_size` is the product of the others and the
    number of shards."""

    size: int  # sequences per shard and microbatch
    accumulation: int  # microbatches
    global_size: int


# From the length of rows, in tokens, to how many of them there are.
RowCounter = Callable[[int], int]


class Facts(NamedTuple):
    """What a run meets: the data, the devices, and the run that it resumes."""

    vocab_size: int  # of the tokenizer
    num_rows: RowCounter  # of the training data, by their length
    mesh_shape: Mapping[str, int]  # devices along each mesh axis
    platform: str  # "cpu", or that of an accelerator
    resumed_batch: int | None = None  # the global batch of the run that is resumed, which is kept

    @property
    def shards(self) -> int:
        """Into how many parts the devices divide a batch."""
        return self.mesh_shape["data"] * self.mesh_shape["fsdp"]


def resolve(config: Config, facts: Facts) -> Resolved:
    """Fills in what depends on the data and the devices. Resolving twice changes nothing.

    Raises:
        UserError: the data does not fit the model, or the batch the devices.
    """
    check_vocabulary(config.model, facts.vocab_size)
    training = config.training

    batch = resolve_batch(training, facts.shards, facts.resumed_batch)
    num_rows = count_rows(facts.num_rows, config.model.max_seq_length)
    max_steps = resolve_steps(config, facts.num_rows, batch.global_size)

    schedule_steps = training.schedule_steps or max_steps
    if max_steps > schedule_steps:
        message = "past training.schedule_steps %d the learning rate stays at its floor"
        log.warning(message, schedule_steps)

    if batch.global_size > num_rows:
        _warn_of_large_batch(batch.global_size, num_rows, config.model, schedule_steps)

    floor = training.min_learning_rate
    asked_microbatches = config.parallelism.pipeline_microbatches
    num_stages = facts.mesh_shape["pipeline"]

    resolved = _narrowed(
        Resolved,
        config,
        model=_narrowed(
            ResolvedModel,
            config.model,
            vocab_size=facts.vocab_size,
            n_inner=config.model.hidden_size,
            n_kv_heads=config.model.kv_heads,
        ),
        training=_narrowed(
            ResolvedTraining,
            training,
            max_steps=max_steps,
            schedule_steps=schedule_steps,
            warmup_steps=resolve_warmup(training.warmup_steps, schedule_steps),
            batch_size=batch.size,
            gradient_accumulation_steps=batch.accumulation,
            global_batch_size=batch.global_size,
            min_learning_rate=training.learning_rate / 10 if floor is None else floor,
            precision=resolve_precision(training, facts.platform),
        ),
        parallelism=_narrowed(
            ResolvedParallelism,
            config.parallelism,
            pipeline_microbatches=choose_microbatches(asked_microbatches, batch.size, num_stages),
        ),
    )
    check_decay(resolved.training)
    return resolved


def check_vocabulary(model: ModelConfig, vocab_size: int) -> None:
    """Raises UserError where the tokenizer has more tokens than `model.vocab_size` allows."""
    if vocab_size > model.vocab_size:
        what = f"the tokenizer has {vocab_size} tokens"
        remedy = f"Set model.vocab_size to {vocab_size}, or prepare the data with fewer tokens"
        raise UserError(f"{what}, more than model.vocab_size {model.vocab_size}", remedy)

    if vocab_size < model.vocab_size:
        message = "vocabulary: %d tokens (model.vocab_size %d is a ceiling)"
        log.info(message, vocab_size, model.vocab_size)


def resolve_steps(config: Config, num_rows: RowCounter, global_batch_size: int) -> int:
    """The steps of a run: `training.max_steps`, or as many as make `training.num_epochs`."""
    training = config.training
    steps = training.max_steps
    if not steps:
        rows_of_length = functools.partial(count_rows, num_rows)
        planned = make_stages(config, global_batch_size)
        steps = steps_of_epochs(planned, training.num_epochs, rows_of_length)

    if steps > MAX_STEPS:
        what = f"training.num_epochs {training.num_epochs} is {steps} steps"
        raise UserError(f"{what}, and {MAX_STEPS} is the most", "Lower training.num_epochs")

    return steps


def stages(config: Resolved) -> Stages:
    """The stages of a run."""
    return make_stages(config, config.training.global_batch_size)


def make_stages(config: Config, global_batch_size: int) -> Stages:
    """The stages of a run with such a batch: one, with rows of `model.max_seq_length`."""
    return (Stage(first_step=0, rows=global_batch_size, length=config.model.max_seq_length),)


def count_rows(num_rows: RowCounter, length: int) -> int:
    """The sequences of the training split; UserError where there is not even one."""
    count = num_rows(length)

    if count < 1:
        what = f"the training split is shorter than one sequence of {length} tokens"
        raise UserError(what, "Lower model.max_seq_length, or prepare more text")

    return count


def rows_of_stream(num_tokens: int) -> RowCounter:
    """The rows of a stream of tokens, the first of which is no target, one after the other."""
    return lambda length: (num_tokens - 1) // length


def _warn_of_large_batch(
    global_batch_size: int, num_rows: int, model: ModelConfig, schedule_steps: int
) -> None:
    floor = "the only step is"
    if schedule_steps > 1:
        floor = f"the last of {schedule_steps} steps is"

    log.warning(
        "a step is %.3g epochs: the global batch is %d sequences, and the training split %d of %d "
        "tokens; %s at the floor of the schedule. Lower training.batch_size (or "
        "training.global_batch_size) or model.max_seq_length, or prepare more text",
        global_batch_size / num_rows,
        global_batch_size,
        num_rows,
        model.max_seq_length,
        floor,
    )


def resolve_precision(
    training: TrainingConfig, platform: str
) -> Literal["float32", "bfloat16", "float16"]:
    """The compute type; `auto` is that in which the platform is fast."""
    if training.fp16:
        return "float16"

    if training.precision == "auto":
        return "float32" if platform == "cpu" else "bfloat16"

    return training.precision


def resolve_batch(training: TrainingConfig, shards: int, resumed_batch: int | None) -> Batch:
    """How the sequences of a step are divided over `shards` devices (data x fsdp).

    Raises:
        UserError: they do not divide, or are too many.
    """
    assert training.batch_size != "auto", "the planner or the caller decides it first"
    wanted = resumed_batch or training.global_batch_size
    default = training.batch_size or DEFAULT_BATCH_SIZE

    asked = training.global_batch_size
    asked = asked or default * training.gradient_accumulation_steps * shards

    if resumed_batch not in (None, asked):
        message = "the global batch stays %d, that of the run that is resumed; asked for: %d"
        log.warning(message, resumed_batch, asked)

    if wanted is None:
        batch = Batch(default, training.gradient_accumulation_steps, asked)
    else:
        _check_batch_divides(wanted, shards, is_resumed=resumed_batch is not None)
        batch = _fewest_microbatches(training, wanted, shards)

    if batch.global_size > MAX_BATCH:
        what = f"{batch.size} sequences x {batch.accumulation} microbatches x {shards} devices"
        remedy = "Lower training.batch_size or training.gradient_accumulation_steps"
        raise UserError(f"{what} is {batch.global_size}, above {MAX_BATCH}", remedy)

    return batch


def _check_batch_divides(global_size: int, shards: int, *, is_resumed: bool) -> None:
    if global_size % shards == 0:
        return

    fewer = max(n for n in range(1, shards) if global_size % n == 0)
    near = max(1, round(global_size / shards)) * shards
    remedy = f"Set training.global_batch_size to {near}"

    if is_resumed:
        others = "with other devices, or some of these for parallelism.tensor or another axis"
        remedy = f"Have {fewer} of them: {others}"

    what = f"the global batch of {global_size} sequences does not divide"
    raise UserError(f"{what} over {shards} devices (data x fsdp)", remedy)


def _fewest_microbatches(training: TrainingConfig, global_size: int, shards: int) -> Batch:
    """The fewest equal microbatches that the ceiling allows; one row each always is allowed."""
    rows = global_size // shards
    ceiling = training.batch_size

    if not ceiling:
        ceiling = rows if training.global_batch_size else DEFAULT_BATCH_SIZE

    assert isinstance(ceiling, int)
    size = largest_divisor(rows, at_most=ceiling)
    return Batch(size, rows // size, global_size)


def choose_microbatches(asked: int | None, batch_size: int, stages: int) -> int:
    """Into how many equal parts `batch_size` rows pass through a pipeline: as many as divide it,
    up to 4 a stage. Without stages nothing is divided."""
    if stages == 1:
        return 1

    wanted = asked or MICROBATCHES_PER_STAGE * stages
    near = largest_divisor(batch_size, at_most=wanted)

    if asked not in (None, near):
        what = f"parallelism.pipeline_microbatches {asked} does not divide"
        remedy = f"Set it to {near}, or to null"
        raise UserError(f"{what} the {batch_size} sequences a device", remedy)

    return near


def resolve_warmup(warmup_steps: int | Literal["auto"], schedule_steps: int) -> int:
    """Warm-up in steps; `auto` is min(500, 10 % of the schedule). UserError where it leaves
    nothing of the schedule."""
    if warmup_steps == "auto":
        return min(WARMUP_STEPS, schedule_steps // 10)

    if warmup_steps >= schedule_steps:
        what = f"training.warmup_steps {warmup_steps} is not below the {schedule_steps} steps"
        remedy = "Set training.warmup_steps: auto, or train for longer"
        raise UserError(f"{what} of the schedule", remedy)

    return warmup_steps


def check_decay(training: ResolvedTraining) -> None:
    """Raises UserError where the warm-up reaches into the decay of wsd."""
    decay = decay_steps(training.decay_fraction, training.schedule_steps)

    if training.schedule == "wsd" and training.warmup_steps + decay > training.schedule_steps:
        what = f"training.warmup_steps {training.warmup_steps} and the {decay} steps"
        remedy = "Lower training.warmup_steps or training.decay_fraction, or train for longer"
        size = f"are more than the {training.schedule_steps} of the schedule"
        raise UserError(f"{what} in which wsd decays {size}", remedy)


def decay_steps(decay_fraction: float, schedule_steps: int) -> int:
    """In how many steps wsd decays."""
    return max(1, round(decay_fraction * schedule_steps))


def _narrowed(cls: type[Section], section: object, **values: object) -> Section:
    """`section` as its narrower type `cls`, with what was decided."""
    return cls(**(vars(section) | values))
