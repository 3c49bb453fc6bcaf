"""Which shape the batch of a step has: a run in stages, one after the other."""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple


class Stage(NamedTuple):
    """Steps whose batches have one shape: those from `first_step` on, up to the next stage."""

    first_step: int  # 0 is the first of a run
    rows: int  # of the global batch
    length: int  # T, the tokens of a row


# In the order of their first steps, of which the first is 0. The last has no end.
Stages = Sequence[Stage]


class _Span(NamedTuple):
    stage: Stage
    num_steps: int


def stage_at(stages: Stages, step: int) -> Stage:
    """The stage to which a step belongs."""
    return [stage for stage in stages if stage.first_step <= step][-1]


def largest(stages: Stages) -> Stage:
    """The stage whose batch has the most tokens."""
    return max(stages, key=lambda stage: stage.rows * stage.length)


def rows_before(stages: Stages, step: int) -> int:
    """The rows of all earlier steps that are as long as those of a step.

    Rows of another length are others: each length has an order of its own, in which a run goes on
    where it left off.
    """
    length = stage_at(stages, step).length
    spans = [span for span in _spans_before(stages, step) if span.stage.length == length]
    return sum(span.num_steps * span.stage.rows for span in spans)


def tokens_before(stages: Stages, step: int) -> int:
    """The tokens of all steps before a step."""
    spans = _spans_before(stages, step)
    return sum(span.num_steps * span.stage.rows * span.stage.length for span in spans)


def steps_of_epochs(stages: Stages, num_epochs: float, count_rows: Callable[[int], int]) -> int:
    """The fewest steps that are `num_epochs` passes over the data.

    Args:
        stages: of the run.
        num_epochs: as a person wrote it.
        count_rows: how many rows of a length the data has.
    """
    # As an exact decimal: 1.1 x 800 as floats is above 880, and would be a step too many of 8
    # sequences.
    left = Fraction(str(num_epochs))

    for stage, following in pairwise(stages):
        epochs_of_step = Fraction(stage.rows, count_rows(stage.length))
        num_steps = following.first_step - stage.first_step

        if left <= num_steps * epochs_of_step:
            return _steps_until(stage, left, count_rows)
        left -= num_steps * epochs_of_step

    return _steps_until(stages[-1], left, count_rows)


def _steps_until(stage: Stage, num_epochs: Fraction, count_rows: Callable[[int], int]) -> int:
    """The steps of a run until its stage has made so many epochs."""
    epochs_of_step = Fraction(stage.rows, count_rows(stage.length))
    return max(1, stage.first_step + math.ceil(num_epochs / epochs_of_step))


def _spans_before(stages: Stages, step: int) -> Iterator[_Span]:
    """How many of the steps before a step each stage has."""
    ends = [stage.first_step for stage in stages[1:]] + [step]
    for stage, end in zip(stages, ends, strict=True):
        last = min(end, step)
        yield _Span(stage, max(0, last - stage.first_step))
