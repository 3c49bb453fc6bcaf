"""batch(step): the batch of any step, computed rather than iterated.

Legend: B batch, T length.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from l1_jax.data.store import documents_at

Batch = dict[str, np.ndarray]


def cut_rows(stream: np.ndarray, length: int) -> np.ndarray:
    """A view of the rows of T + 1 tokens, `[num_rows, T + 1]`.

    Each row overlaps the next by one token, so that every token is a target once.
    """
    windows = sliding_window_view(stream, length + 1)
    return windows[::length]


class TrainingBatches:
    """The batches of a run: all rows once per epoch, shuffled anew in each, for ever.

    Args:
        stream: token ids `[num_tokens]`, laid out as in the token store.
        length: T, the tokens of a row.
        global_batch_size: B, the rows of a step on all devices together.
        seed: of the shuffles.
        eot_id: given where attention is to stay inside a document.
    """

    def __init__(
        self,
        stream: np.ndarray,
        length: int,
        global_batch_size: int,
        seed: int,
        eot_id: int | None = None,
    ):
        self.global_batch_size = global_batch_size
        self.eot_id = eot_id

        self._stream = stream
        self._rows = cut_rows(stream, length)

        # It imports jax, which this room does without: those that prepare data do not need it.
        import grain

        # grain seeds each epoch's permutation by (seed, epoch), and computes any element without
        # the ones before it.
        numbers = grain.MapDataset.range(len(self._rows))
        self._order = numbers.seed(seed).shuffle().repeat()

    def __call__(self, step: int, rows: Sequence[int]) -> Batch:
        """Some rows of the batch of a step, in the order asked for; a pure function.

        Args:
            step: 0 is the first.
            rows: which rows of the global batch, 0 to B - 1.

        Returns:
            The fields of `make_batch`, and `row_hash`, uint32 `[len(rows)]`.
        """
        tokens = self._rows[self._row_numbers(step, rows)].astype(np.int32)
        batch = make_batch(tokens, self.eot_id)

        # Each hash begins with the row's place: the step adds them up, and the sum is to tell a
        # swap of two rows.
        hashes = [
            zlib.crc32(row_tokens.tobytes(), row)
            for row, row_tokens in zip(rows, tokens, strict=True)
        ]
        batch["row_hash"] = np.array(hashes, np.uint32)
        return batch

    def _row_numbers(self, step: int, rows: Sequence[int]) -> np.ndarray:
        """The numbers in the stream of these rows of a batch."""
        first = step * self.global_batch_size
        return np.array([self._order[first + row] for row in rows])

    def sources(self, step: int, eot_id: int) -> list[dict[str, Any]]:
        """Where each row of a batch is from. Reads the stream once.

        Returns:
            For each row its number in the stream, `row`, whose T targets begin at token
            T x row + 1, and the first and the last of its `documents`.
        """
        length = self._rows.shape[1] - 1
        numbers = self._row_numbers(step, range(self.global_batch_size))

        first_and_last_target = np.array([1, length])
        positions = numbers[:, None] * length + first_and_last_target
        documents = documents_at(self._stream, eot_id, positions)

        return [
            {"row": int(number), "documents": pair.tolist()}
            for number, pair in zip(numbers, documents, strict=True)
        ]


def make_batch(rows: np.ndarray, eot_id: int | None = None) -> Batch:
    """Splits rows into inputs and targets.

    A document's segment begins with the end-of-text token before it; its positions count from
    there.

    Args:
        rows: token ids, int32 `[B, T + 1]`.
        eot_id: adds the segments and positions of documents.

    Returns:
        `tokens`, `targets` and `weights` (float32), all `[B, T]`; with `eot_id` also
        `segment_ids` and `positions`, int32 `[B, T]`.
    """
    tokens_BT = np.ascontiguousarray(rows[:, :-1])
    targets_BT = np.ascontiguousarray(rows[:, 1:])
    batch = {
        "tokens": tokens_BT,
        "targets": targets_BT,
        "weights": np.ones(tokens_BT.shape, np.float32),
    }
    if eot_id is None:
        return batch

    starts_BT = tokens_BT == eot_id
    batch["segment_ids"] = np.cumsum(starts_BT, axis=1, dtype=np.int32)

    # A token's distance from the last start before it, which is a running maximum.
    order_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    last_start_BT = np.maximum.accumulate(np.where(starts_BT, order_T, 0), axis=1)
    batch["positions"] = order_T - last_start_BT
    return batch


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
