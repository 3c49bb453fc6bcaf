"""batch(step): the batch of any step, computed rather than iterated.

Legend: B batch, T length.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from l1_jax.config.stages import Stages, rows_before, stage_at
from l1_jax.data.sources import (
    Batch,
    Dims,
    Field,
    Fields,
    Order,
    Source,
    cut_rows,
    dims_of,
    make_batch,
)

_ROW_HASH = Field(np.dtype(np.uint32), dims=("batch",), row_shape=())


def batch_fields(fields: Fields) -> Fields:
    """The fields of a batch: those of its source, and `row_hash`."""
    return fields | {"row_hash": _ROW_HASH}


class TrainingBatches:
    """The batches of a run: the rows of a source in its order, for ever.

    Args:
        source: of the rows.
        stages: how many rows a step has, and of which length.
        seed: of the shuffles.
    """

    def __init__(self, source: Source, stages: Stages, seed: int):
        self.stages = stages
        self._source = source

        # By the length of the rows.
        self._orders: dict[int, Order] = {}
        for stage in stages:
            self._orders[stage.length] = source.order(stage.length, seed)

    @property
    def dims(self) -> dict[str, Dims]:
        """The names of the dims of a batch's fields, which are the same in all stages."""
        fields = self._source.fields(self.stages[0].length)
        return dims_of(batch_fields(fields))

    def __call__(self, step: int, rows: Sequence[int]) -> Batch:
        """Some rows of the batch of a step, in the order asked for; a pure function.

        Args:
            step: 0 is the first.
            rows: which rows of the global batch, from 0 on.

        Returns:
            The fields of the source, and `row_hash`, uint32 `[len(rows)]`.
        """
        length = stage_at(self.stages, step).length
        batch = self._source.rows(self._row_numbers(step, rows), length)
        content = self._source.content(batch)

        hashes = []
        for index, row in enumerate(rows):
            content_of_row = [part[index] for part in content]
            hashes.append(hash_row(content_of_row, place=row))

        batch["row_hash"] = np.array(hashes, np.uint32)
        return batch

    def _row_numbers(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """The numbers in the source of these rows of a batch."""
        order = self._orders[stage_at(self.stages, step).length]
        first = rows_before(self.stages, step)
        return np.array([order[first + row] for row in rows])

    def where(self, step: int) -> list[dict[str, Any]]:
        """Where each row of the batch of a step is from, see `Source.where`."""
        stage = stage_at(self.stages, step)
        numbers = self._row_numbers(step, range(stage.rows))
        return self._source.where(numbers, stage.length)


def hash_row(content: Sequence[np.ndarray], place: int) -> int:
    """The hash of a row, from its place in the batch on.

    A step's hash is the sum of its rows'; because of the place a swap of two rows changes it.
    """
    value = place
    for part in content:
        value = zlib.crc32(part.tobytes(), value)
    return value


def evaluation_batches(
    stream: np.ndarray, length: int, batch_size: int, eot_id: int | None = None
) -> Iterator[Batch]:
    """The whole stream in order.

    The rest of the last batch is padded with targets of weight 0.

    Args:
        stream: token ids `[num_tokens]`.
        length: T, the tokens of a row.
        batch_size: B, the rows of a batch.
        eot_id: given where attention is to stay inside a document.
    """
    num_targets = len(stream) - 1
    batch_tokens = batch_size * length

    for first in range(0, num_targets, batch_tokens):
        # One token more than inputs, for the last target.
        part = stream[first : first + batch_tokens + 1].astype(np.int32)
        missing = batch_tokens + 1 - len(part)
        rows = cut_rows(np.pad(part, (0, missing)), length)

        is_real = first + np.arange(batch_tokens) < num_targets
        batch = make_batch(rows, eot_id)
        batch["weights"] = is_real.astype(np.float32).reshape(batch_size, length)
        yield batch


class Prefetch:
    """Computes `function(step)` for the next steps in the background.

    The function is pure. That makes this safe, and any step may be asked for.

    Args:
        function: takes a step's number.
        end: the step after the last one.
        depth: how many steps are computed ahead.
    """

    def __init__(self, function: Callable[[int], Any], end: int, depth: int = 2):
        self._function = function
        self._end = end
        self._depth = depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Any]] = {}

    def __call__(self, step: int) -> Any:
        """What the function gives for a step; the next ones begin meanwhile."""
        after = min(step + 1 + self._depth, self._end)
        for ahead in range(step, after):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._function, ahead)

        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Drops what has not begun."""
        self._pool.shutdown(cancel_futures=True)
