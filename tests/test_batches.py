"""The order of the data is computed, complete, and the same whoever asks for which part of it."""

import zlib

import numpy as np
import pytest

from l1_jax.config.stages import Stage
from l1_jax.data.batches import Prefetch, TrainingBatches, evaluation_batches
from l1_jax.data.sources import TokenSource, make_batch

STREAM = np.arange(1, 1 + 10 * 4 + 3).astype(np.uint16)  # 10 rows of 4 targets and a rest of 2


def make(batch_size=3, seed=7, eot_id=None):
    masks = eot_id is not None
    source = TokenSource(STREAM, eot_id or 0, document_mask=masks, digest="")
    return TrainingBatches(source, (Stage(0, batch_size, 4),), seed)


def first_tokens(batches, count):
    return [
        int(t)
        for step in range(count)
        for t in batches(step, range(batches.stages[0].rows))["tokens"][:, 0]
    ]


def test_every_row_once_an_epoch_and_in_a_new_order():
    order = first_tokens(make(batch_size=5), 4)
    epochs = order[:10], order[10:]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 41, 4))] * 2
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_order_depends_on_the_seed_and_not_on_the_batch_size():
    assert first_tokens(make(batch_size=5), 6) == first_tokens(make(batch_size=3), 10)
    assert first_tokens(make(seed=8), 10) != first_tokens(make(), 10)


def test_a_batch_is_computed_not_iterated():
    forwards = [make()(step, range(3)) for step in range(20)]
    batches = make()
    for step in (19, 3, 3, 0, 11):
        np.testing.assert_equal(batches(step, range(3)), forwards[step])


def test_a_part_of_the_batch_is_that_part_of_it():
    whole, part = make()(5, range(3)), make()(5, [1, 2])
    for name in whole:
        np.testing.assert_array_equal(part[name], whole[name][1:])


def test_rows_hold_a_token_and_the_one_after_it():
    batch = make()(0, range(3))
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    assert batch["weights"].min() == 1


def test_row_hash_knows_content_and_place():
    hashes = {tuple(make()(step, range(3))["row_hash"]) for step in range(10)}
    assert len(hashes) == 10
    a, b = make()(0, [0, 1])["row_hash"], make()(0, [1, 0])["row_hash"]
    assert set(a) == set(b)  # a row carries its own hash wherever it is read


def test_row_hash_by_hand():
    """Of the row's tokens as int32, the last target included, from its place on."""
    batches = make()
    hashes = batches(2, [2, 0])["row_hash"]
    for place, found in zip([2, 0], hashes, strict=True):
        start = 4 * batches.where(2)[place]["row"]
        tokens = STREAM[start : start + 5].astype("<i4")
        assert found == zlib.crc32(tokens.tobytes(), place)


def test_documents_begin_at_end_of_text():
    batch = make_batch(np.array([[5, 0, 6, 7, 0, 8, 9]]), eot_id=0)
    assert batch["segment_ids"].tolist() == [[0, 1, 1, 1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 0, 1, 2, 0, 1]]
    assert batch["positions"].dtype == batch["segment_ids"].dtype == np.int32


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 20])
def test_evaluation_counts_every_target_once(batch_size):
    seen = []
    for batch in evaluation_batches(STREAM, 4, batch_size):
        assert batch["tokens"].shape == (batch_size, 4)
        counted = batch["weights"] == 1
        seen += batch["targets"][counted].tolist()
        np.testing.assert_array_equal(batch["tokens"][counted] + 1, batch["targets"][counted])
    assert seen == STREAM[1:].tolist()


def test_prefetch_gives_what_was_asked_for_and_stops_at_the_end():
    asked = []
    prefetch = Prefetch(lambda step: asked.append(step) or step * 10, end=6)
    assert [prefetch(step) for step in (0, 1, 2, 5)] == [0, 10, 20, 50]
    prefetch.close()
    assert max(asked) == 5


def test_prefetch_raises_what_the_reading_raised():
    prefetch = Prefetch(lambda step: 1 // step, end=3)
    with pytest.raises(ZeroDivisionError):
        prefetch(0)
    prefetch.close()
