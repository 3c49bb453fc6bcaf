"""Objectives by name: `objective.name`."""

from l1_jax.objectives.next_token import NextToken
from l1_jax.objectives.objective import Objective
from l1_jax.objectives.section import ObjectiveConfig


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a run."""
    makers = {"next_token": NextToken}
    return makers[config.name](z_loss=config.z_loss)
