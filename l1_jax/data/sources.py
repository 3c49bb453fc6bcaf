"""Where the rows of a batch are from: a second source is a class beside `TokenSource`.

Legend: B batch, T length.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from l1_jax.data.store import documents_at

# Fields by name: arrays that begin with the rows.
Batch = dict[str, np.ndarray]

# Names of an array's dims, as those of `parallel/sharding.py`; None: one that is never divided.
Dims = tuple[str | None, ...]


class Field(NamedTuple):
    """What is known of a field of a batch before a row of it is read."""

    dtype: np.dtype
    dims: Dims  # the first is "batch"; "length" is a dim of positions, wherever it is
    row_shape: tuple[int, ...]  # the sizes of the other dims


Fields = dict[str, Field]


def dims_of(fields: Fields) -> dict[str, Dims]:
    """The names of the dims of each field."""
    return {name: field.dims for name, field in fields.items()}


class Order(Protocol):
    """Numbers of rows in the order in which a run takes them: without end, and computed."""

    def __getitem__(self, index: int, /) -> int: ...


class Source(Protocol):
    """Rows of any length that is asked for, by their numbers. All of it is pure.

    Attributes:
        digest: changes with anything that the rows are made of.
    """

    digest: str

    def num_rows(self, length: int) -> int:
        """How many rows of `length` tokens there are."""
        ...

    def order(self, length: int, seed: int) -> Order:
        """In which order a run takes the rows."""
        ...

    def fields(self, length: int) -> Fields:
        """The fields of `rows`."""
        ...

    def rows(self, numbers: np.ndarray, length: int) -> Batch:
        """The rows of these numbers, in the order asked for.

        Args:
            numbers: int, from 0 to `num_rows(length)` - 1.
            length: T, the tokens of a row.

        Returns:
            Arrays that begin with the rows, as `fields` says.
        """
        ...

    def content(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """What of some rows is hashed: all that their other fields follow from."""
        ...

    def where(self, numbers: np.ndarray, length: int) -> list[dict[str, Any]]:
        """Says of each of these rows where it is from, for JSON."""
        ...


class TokenSource:
    """Rows of a stream of tokens, as a token store has it, one after the other.

    Args:
        stream: token ids `[num_tokens]`, laid out as in the token store.
        eot_id: of the end of text in it.
        document_mask: attention is to stay inside a document.
        digest: of all that the stream was made of.
    """

    def __init__(self, stream: np.ndarray, eot_id: int, *, document_mask: bool, digest: str):
        self.digest = digest
        self._stream = stream
        self._eot_id = eot_id
        self._document_mask = document_mask

        # By their length.
        self._cut: dict[int, np.ndarray] = {}

    def num_rows(self, length: int) -> int:
        """The rows with T targets each; what is left at the end is in none."""
        return (len(self._stream) - 1) // length

    def order(self, length: int, seed: int) -> Order:
        """All rows once per epoch, shuffled anew in each."""
        return endless_order(self.num_rows(length), seed)

    def fields(self, length: int) -> Fields:
        """See `token_fields`."""
        return token_fields(length, document_mask=self._document_mask)

    def rows(self, numbers: np.ndarray, length: int) -> Batch:
        """The fields of `make_batch`."""
        if length not in self._cut:
            self._cut[length] = cut_rows(self._stream, length)

        tokens = self._cut[length][numbers].astype(np.int32)
        return make_batch(tokens, self._eot_id if self._document_mask else None)

    def content(self, batch: Batch) -> tuple[np.ndarray, ...]:
        """The T + 1 tokens of each row."""
        return batch["tokens"], batch["targets"][:, -1:]

    def where(self, numbers: np.ndarray, length: int) -> list[dict[str, Any]]:
        """Where each row is from. Reads the stream once.

        Returns:
            For each its number in the stream, `row`, whose T targets begin at token T x row + 1,
            and the first and the last of its `documents`.
        """
        first_and_last_target = np.array([1, length])
        positions = numbers[:, None] * length + first_and_last_target
        documents = documents_at(self._stream, self._eot_id, positions)

        return [
            {"row": int(number), "documents": pair.tolist()}
            for number, pair in zip(numbers, documents, strict=True)
        ]


def endless_order(num_rows: int, seed: int) -> Any:
    """The numbers of the rows, in a new order in each epoch, as a sequence without end."""
    # It imports jax, which this room does without: those that prepare data do not need it.
    import grain

    # grain seeds each epoch's permutation by (seed, epoch), and computes any element without
    # the ones before it.
    return grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()


def cut_rows(stream: np.ndarray, length: int) -> np.ndarray:
    """A view of the rows of T + 1 tokens, `[num_rows, T + 1]`.

    Each row overlaps the next by one token, so that every token is a target once.
    """
    windows = sliding_window_view(stream, length + 1)
    return windows[::length]


def token_fields(length: int, *, document_mask: bool) -> Fields:
    """The fields of `make_batch`.

    Args:
        length: T, the tokens of a row.
        document_mask: attention is to stay inside a document.
    """
    types = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
    if document_mask:
        types |= {"segment_ids": np.int32, "positions": np.int32}

    return {
        name: Field(np.dtype(dtype), dims=("batch", "length"), row_shape=(length,))
        for name, dtype in types.items()
    }


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
