"""batch(step): the batch of any step, computed rather than iterated.

Legend: B batch, T length.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import grain
import numpy as np

Batch = dict[str, np.ndarray]
T = TypeVar("T")


class _Rows:
    """Rows of `length + 1` tokens cut from a stream; each overlaps the next by one token, so every token is a target."""

    def __init__(self, stream: np.ndarray, length: int):
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.length

    def __getitem__(self, row: int) -> np.ndarray:
        start = row * self.length
        return self.stream[start : start + self.length + 1].astype(np.int32)


class TrainingBatches:
    """The batches of a run: all rows once per epoch, shuffled anew in each, for ever.

    `batch(step)` is a pure function of the stream, the seed and the step.

    Args:
        stream: 1-D token ids, as the token store lays them out (may be memory-mapped).
        length: T.
        global_batch_size: B, over all devices and microbatches.
        seed: of the order.
        eot_id: what separates documents; given only where attention is to stay inside one.
    """

    def __init__(self, stream: np.ndarray, length: int, global_batch_size: int, seed: int, eot_id: int | None = None):
        self.length, self.global_batch_size, self.eot_id = length, global_batch_size, eot_id
        self.num_rows = max(0, (len(stream) - 1) // length)
        # grain seeds each epoch's permutation by (seed, epoch) and computes any element without the ones before it.
        self._rows = grain.MapDataset.source(_Rows(stream, length)).seed(seed).shuffle().repeat()

    def __call__(self, step: int, rows: Sequence[int]) -> Batch:
        """These rows of the batch of step number `step` (0 is the first), in the order asked for."""
        cut = np.stack([self._rows[step * self.global_batch_size + int(row)] for row in rows])
        batch = make_batch(cut, self.eot_id)
        batch["row_hash"] = np.array([zlib.crc32(r.tobytes(), int(i)) for i, r in zip(rows, cut)], np.uint32)
        return batch


def make_batch(rows: np.ndarray, eot_id: int | None = None) -> Batch:
    """`[B, T + 1]` tokens -> `tokens`, `targets`, `weights` `[B, T]`; with `eot_id` also `segment_ids`, `positions`.

    A document's segment begins with the end-of-text token before it; its positions count from there.
    """
    tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
    batch = {"tokens": tokens, "targets": targets, "weights": np.ones(tokens.shape, np.float32)}
    if eot_id is not None:
        starts = tokens == eot_id
        order = np.arange(tokens.shape[1], dtype=np.int32)
        batch["segment_ids"] = np.cumsum(starts, axis=1, dtype=np.int32)
        batch["positions"] = order - np.maximum.accumulate(np.where(starts, order, 0), axis=1)
    return batch


def evaluation_batches(stream: np.ndarray, length: int, batch_size: int, eot_id: int | None = None) -> Iterator[Batch]:
    """The whole stream in order, in windows of `length`; the rest is padded with targets of weight 0."""
    targets = len(stream) - 1
    for start in range(0, targets, length * batch_size):
        count = min(targets - start, length * batch_size)
        rows = _Rows(stream, length)
        cut = np.zeros((batch_size, length + 1), np.int32)
        for i in range(-(-count // length)):
            row = rows[start // length + i]
            cut[i, : len(row)] = row
        batch = make_batch(cut, eot_id)
        batch["weights"] = (np.arange(batch_size * length) < count).astype(np.float32).reshape(batch_size, length)
        yield batch


class Prefetch:
    """Computes `function(step)` for the next steps in the background. Purity makes this safe, and any step askable."""

    def __init__(self, function: Callable[[int], T], end: int, depth: int = 2):
        self._function, self._end, self._depth = function, end, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future] = {}

    def __call__(self, step: int) -> T:
        for ahead in range(step, min(step + 1 + self._depth, self._end)):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._function, ahead)
        return self._ahead.pop(step).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
