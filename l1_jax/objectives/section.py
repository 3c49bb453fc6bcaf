"""The keys of what a run minimises."""

import dataclasses
from typing import Literal

from l1_jax.config.key import key


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What a run minimises."""

    name: Literal["next_token"] = key(
        "next_token", "the loss: of predicting the next token", resume="fatal"
    )
    z_loss: float = key(
        0.0,
        "weight of the squared logarithm of the softmax's denominator, which keeps logits small",
        resume="warned",
        ge=0.0,
    )
