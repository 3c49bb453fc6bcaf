"""Objectives by name: `objective.name`."""

from collections.abc import Callable

from l1_jax.objectives.next_token import NextToken
from l1_jax.objectives.objective import Objective
from l1_jax.objectives.section import ObjectiveConfig

MAKERS: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "next_token": lambda config: NextToken(z_loss=config.z_loss)
}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a run."""
    return MAKERS[config.name](config)
