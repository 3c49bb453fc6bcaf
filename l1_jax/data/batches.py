"""batch(step): the batch of any step, computed rather than iterated.

Legend: B batch, T length.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from l1_jax.data.store import documents_at

Batch = dict[str, np.ndarray]


def cut_rows(stream: np.ndarray, length: int) -> np.ndarray:
    """A view of the rows of T + 1 tokens; each overlaps the next by one token, so that every token is a target once."""
    return sliding_window_view(stream, length + 1)[::length]


class TrainingBatches:
    """The batches of a run: all rows of T = `length` tokens once per epoch, shuffled anew in each by `seed`, for ever.

    `stream` is laid out as in the token store; `eot_id` is given where attention is to stay inside a document.
    """

    def __init__(self, stream: np.ndarray, length: int, global_batch_size: int, seed: int, eot_id: int | None = None):
        self.global_batch_size, self.eot_id = global_batch_size, eot_id
        self._stream, self._rows = stream, cut_rows(stream, length)
        # grain seeds each epoch's permutation by (seed, epoch), and computes any element without the ones before it.
        self._order = grain.MapDataset.range(len(self._rows)).seed(seed).shuffle().repeat()

    def __call__(self, step: int, rows: Sequence[int]) -> Batch:
        """These rows of the batch of step `step` (0 is the first), in the order asked for; a pure function."""
        cut = self._rows[self._numbers(step, rows)].astype(np.int32)
        hashes = [zlib.crc32(tokens.tobytes(), row) for row, tokens in zip(rows, cut, strict=True)]
        return make_batch(cut, self.eot_id) | {"row_hash": np.array(hashes, np.uint32)}

    def _numbers(self, step: int, rows: Sequence[int]) -> np.ndarray:
        return np.array([self._order[step * self.global_batch_size + row] for row in rows])

    def sources(self, step: int, eot_id: int) -> list[dict[str, Any]]:
        """Where each row of a batch is from: its number in the stream, `row`, whose T targets begin at token T x row +
        1, and the first and the last of its `documents`. Reads the stream once."""
        numbers, length = self._numbers(step, range(self.global_batch_size)), self._rows.shape[1] - 1
        ends = numbers[:, None] * length + np.array([1, length])
        documents = documents_at(self._stream, eot_id, ends)
        return [{"row": int(n), "documents": pair.tolist()} for n, pair in zip(numbers, documents, strict=True)]


def make_batch(rows: np.ndarray, eot_id: int | None = None) -> Batch:
    """`[B, T + 1]` tokens -> `tokens`, `targets`, `weights` `[B, T]`; with `eot_id` also `segment_ids`, `positions`.

    A document's segment begins with the end-of-text token before it; its positions count from there.
    """
    tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}
    if eot_id is not None:
        starts, order = tokens == eot_id, np.arange(tokens.shape[1], dtype=np.int32)
        batch["segment_ids"] = np.cumsum(starts, axis=1, dtype=np.int32)
        batch["positions"] = order - np.maximum.accumulate(np.where(starts, order, 0), axis=1)
    return batch


def evaluation_batches(stream: np.ndarray, length: int, batch_size: int, eot_id: int | None = None) -> Iterator[Batch]:
    """The whole stream in order, in windows of `length`; the rest is padded with targets of weight 0."""
    num_targets, size = len(stream) - 1, batch_size * length
    for first in range(0, num_targets, size):
        part = stream[first : first + size + 1].astype(np.int32)
        rows = cut_rows(np.pad(part, (0, size + 1 - len(part))), length)
        weights = (first + np.arange(size) < num_targets).astype(np.float32).reshape(batch_size, length)
        yield make_batch(rows, eot_id) | {"weights": weights}


class Prefetch:
    """Computes `function(step)` for the next steps in the background. Purity makes this safe, and any step askable."""

    def __init__(self, function: Callable[[int], Any], end: int, depth: int = 2):
        self._function, self._end, self._depth = function, end, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[Any]] = {}

    def __call__(self, step: int) -> Any:
        for ahead in range(step, min(step + 1 + self._depth, self._end)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._function, ahead)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
