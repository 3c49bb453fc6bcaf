"""The sections put together: a whole run, and what does not go together in it."""

import dataclasses
import os
import re
from collections.abc import Iterator
from typing import Any, Self

from l1_jax.data.section import DataConfig
from l1_jax.errors import UserError
from l1_jax.inference.section import GenerationConfig
from l1_jax.model.section import ModelConfig
from l1_jax.objectives.section import ObjectiveConfig
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.training.section import TrainingConfig, TransferConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run, as a person asks for it."""

    model: ModelConfig = dataclasses.field(default=ModelConfig())
    data: DataConfig = dataclasses.field(default=DataConfig())
    training: TrainingConfig = dataclasses.field(default=TrainingConfig())
    objective: ObjectiveConfig = dataclasses.field(default=ObjectiveConfig())
    transfer: TransferConfig | None = None
    parallelism: ParallelismConfig = dataclasses.field(default=ParallelismConfig())
    generation: GenerationConfig = dataclasses.field(default=GenerationConfig())

    def replace(self, section: str, **values: Any) -> Self:
        """A copy with some keys of one section changed."""
        changed = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **{section: changed})


def contradictions(config: Config) -> Iterator[UserError]:
    """Yields an error for every pair of keys that do not go together."""
    yield from _in_model(config.model)
    yield from _in_paths(config)
    yield from _in_transfer(config.transfer)
    yield from _in_training(config.training)
    yield from _in_mesh(config.parallelism)


def _in_model(model: ModelConfig) -> Iterator[UserError]:
    heads = model.n_heads

    if model.head_size is None and model.n_embd % heads:
        fits = largest_divisor(model.n_embd, at_most=heads)
        what = f"model.n_embd {model.n_embd} is not divisible by model.n_heads {heads}"
        remedy = f"Set model.n_heads to {fits}, model.n_embd to a multiple of {heads}"
        remedy += ", or model.head_size"
        yield UserError(what, remedy)

    if heads % model.kv_heads:
        fits = largest_divisor(heads, at_most=model.kv_heads)
        what = f"model.n_heads {heads} is not divisible by model.n_kv_heads {model.n_kv_heads}"
        yield UserError(what, f"Set model.n_kv_heads to {fits}")
        return

    head_size = model.head_dims

    if model.position_embedding == "rope" and head_size % 2:
        what = "model.position_embedding is rope, which turns pairs"
        remedy = "Set model.head_size, or choose model.n_embd and model.n_heads, so that it is even"
        yield UserError(f"{what}, and a head has {head_size} dims", remedy)


def _in_paths(config: Config) -> Iterator[UserError]:
    directories = {"data.path": config.data.path, "training.output_dir": config.training.output_dir}

    if config.transfer and config.transfer.from_ is not None:
        directories["transfer.from"] = config.transfer.from_

    for name, directory in directories.items():
        if not directory:
            yield UserError(f"{name} is empty", "Give a directory")
        elif not _is_path(directory):
            what = f"{name} is {directory[:60]!a}, which no file can be called"
            yield UserError(what, "Give a directory")


def _in_transfer(transfer: TransferConfig | None) -> Iterator[UserError]:
    for pattern in transfer.freeze if transfer else ():
        try:
            re.compile(pattern)
        except re.error as error:
            what = f"transfer.freeze has {pattern!r}, which is no regular expression"
            yield UserError(f"{what} ({error.msg})", "Correct it")


def _in_training(training: TrainingConfig) -> Iterator[UserError]:
    if training.batch_size == "auto" and training.global_batch_size is None:
        what = "training.batch_size is auto, and training.global_batch_size is not set"
        remedy = "Set training.global_batch_size"
        why = "what a run computes must not depend on the device's memory"
        yield UserError(what, f"{remedy}: {why}")

    if training.fp16 and training.precision not in ("auto", "float16"):
        what = f"training.fp16 is true and training.precision is {training.precision!r}"
        yield UserError(what, "Keep one of the two: fp16: true means precision: float16")

    floor = training.min_learning_rate
    peak = training.learning_rate

    if floor is not None and floor > peak:
        what = f"training.min_learning_rate {floor} is above training.learning_rate {peak}"
        yield UserError(what, "Lower training.min_learning_rate")


def _in_mesh(parallelism: ParallelismConfig) -> Iterator[UserError]:
    sizes = {axis: getattr(parallelism, axis) for axis in MESH_AXES}

    for axis, size in sizes.items():
        if size == 0:
            remedy = "Set it to 1 or more, or to -1 for the rest of the devices"
            yield UserError(f"parallelism.{axis} is 0", remedy)

    rest = [axis for axis, size in sizes.items() if size == -1]

    if len(rest) > 1:
        remedy = "Leave -1 to one axis"
        if "data" in rest:
            remedy = "Set parallelism.data to 1: it is -1 where it is not set"
        yield UserError(f"parallelism has more than one -1 ({', '.join(rest)})", remedy)


def _is_path(text: str) -> bool:
    """Whether the system would take `text` for a path: NUL and halves of surrogate pairs are in
    none."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    candidates = range(min(number, at_most), 0, -1)
    return next(divisor for divisor in candidates if number % divisor == 0)
