"""The sections put together: a whole run, and what does not go together in it."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from l1_jax.data.section import DataConfig
from l1_jax.errors import UserError
from l1_jax.inference.section import GenerationConfig
from l1_jax.model.section import ModelConfig
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.training.section import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: ModelConfig = dataclasses.field(default=ModelConfig())
    data: DataConfig = dataclasses.field(default=DataConfig())
    training: TrainingConfig = dataclasses.field(default=TrainingConfig())
    parallelism: ParallelismConfig = dataclasses.field(default=ParallelismConfig())
    generation: GenerationConfig = dataclasses.field(default=GenerationConfig())

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
