"""A second source, a second stage, and dims that are told by their names alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parallel import sizes
from test_training import TRAINING, assert_close

from l1_jax.config.resolve import Facts, resolve, rows_of_stream, stages
from l1_jax.config.schema import Config
from l1_jax.config.stages import (
    Stage,
    largest,
    rows_before,
    stage_at,
    steps_of_epochs,
    tokens_before,
)
from l1_jax.data.batches import TrainingBatches
from l1_jax.data.sources import Field, TokenSource, endless_order
from l1_jax.model.context import Sum
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.objective import Terms
from l1_jax.parallel.layout import Layout, split_rows, zigzag
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import put_batch, put_flag
from l1_jax.parallel.sharding import named
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.program import batch_shapes
from l1_jax.training.state import create_state
from l1_jax.training.step import make_train_step

ROWS = 16
LENGTH = 8
TWO = (Stage(0, rows=6, length=2), Stage(4, rows=3, length=4), Stage(7, rows=5, length=4))


def test_stages_by_hand():
    """Each step one by one: which shape it has, and what came before it."""
    shapes = [(6, 2)] * 4 + [(3, 4)] * 3 + [(5, 4)] * 5
    for step, (rows, length) in enumerate(shapes):
        before = shapes[:step]
        assert stage_at(TWO, step)[1:] == (rows, length)
        assert tokens_before(TWO, step) == sum(r * t for r, t in before)
        assert rows_before(TWO, step) == sum(r for r, t in before if t == length)
    assert largest(TWO) == TWO[2]


def test_epochs_over_stages():
    """By going through the steps; 41 targets are 20 rows of 2, or 10 of 4."""

    def steps(num_epochs):
        made, count = 0.0, 0
        while made < num_epochs - 1e-9:
            stage = stage_at(TWO, count)
            made += stage.rows / rows_of_stream(42)(stage.length)
            count += 1
        return count

    def rows_of_length(length):
        return rows_of_stream(42)(length)

    for num_epochs in (0.1, 0.3, 1.2, 1.25, 1.5, 1.6, 2.1, 2.11, 2.6, 7.0):
        assert steps_of_epochs(TWO, num_epochs, rows_of_length) == steps(num_epochs), num_epochs
    assert steps_of_epochs((Stage(0, 8, 1),), 1.1, lambda _: 800) == 110


def test_batches_over_stages():
    """Rows are as long and as many as the stage says; one of a length goes on where it left off."""
    stream = np.arange(1, 44).astype(np.uint16)
    source = TokenSource(stream, eot_id=0, document_mask=False, digest="")
    batches = TrainingBatches(source, TWO, seed=7)
    alone = TrainingBatches(source, (Stage(0, rows=1, length=4),), seed=7)
    at = 0
    for step in range(12):
        stage = stage_at(TWO, step)
        batch = batches(step, range(stage.rows))
        assert batch["tokens"].shape == (stage.rows, stage.length)
        assert len(batches.where(step)) == stage.rows
        if stage.length == 4:
            for row in range(stage.rows):
                expected = alone(at, [0])["tokens"][0]
                np.testing.assert_array_equal(batch["tokens"][row], expected)
                at += 1


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_batch_has_the_fields_that_are_said(document_mask):
    """By the source, and by the config for a plan without data."""
    stream = np.random.default_rng(0).integers(0, 9, 400).astype(np.uint16)
    source = TokenSource(stream, eot_id=0, document_mask=document_mask, digest="")
    assert source.num_rows(LENGTH) == rows_of_stream(400)(LENGTH)

    model = ModelConfig(vocab_size=9, max_seq_length=LENGTH, n_layers=1, n_heads=1, n_embd=8)
    config = Config(model=model).replace("data", document_mask=document_mask)
    mesh = create_mesh(sizes("data=8"), jax.devices())
    facts = Facts(9, rows_of_stream(400), dict(mesh.shape), "cpu")
    config = resolve(config.replace("training", global_batch_size=ROWS), facts)

    batches = TrainingBatches(source, stages(config), seed=0)
    batch = batches(3, range(ROWS))
    placed = put_batch(batch, batches.dims, rows=range(ROWS), mesh=mesh, global_batch_size=ROWS)
    placed["stop"] = put_flag(False, mesh)

    shapes = batch_shapes(config, mesh)
    assert placed.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert (placed[name].shape, placed[name].dtype) == (shape.shape, shape.dtype), name
        assert placed[name].sharding == shape.sharding, name


class ChoiceSource:
    """Tokens with K choices a position, and two texts a row: `[B, T, K]` and `[B, 2, T]`."""

    digest = "made up"

    def num_rows(self, length):
        return 40

    def order(self, length, seed):
        return endless_order(self.num_rows(length), seed)

    def fields(self, length):
        ids = np.dtype(np.int32)
        of_position = Field(ids, dims=("batch", "length"), row_shape=(length,))
        return {
            "tokens": of_position,
            "choices": Field(ids, dims=("batch", "length", None), row_shape=(length, 3)),
            "pairs": Field(ids, dims=("batch", None, "length"), row_shape=(2, length)),
            "weights": Field(np.dtype(np.float32), ("batch", "length"), (length,)),
            "score": Field(np.dtype(np.float32), dims=("batch", None), row_shape=(length,)),
        }

    def rows(self, numbers, length):
        def draw(number, field):
            rng = np.random.default_rng([number, len(field.row_shape), field.row_shape[0]])
            return rng.integers(0, 50, field.row_shape).astype(field.dtype)

        fields = self.fields(length)
        return {
            name: np.stack([draw(number, field) for number in numbers])
            for name, field in fields.items()
        }

    def content(self, batch):
        return tuple(batch.values())

    def where(self, numbers, length):
        return [{"row": int(number)} for number in numbers]


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The sum of the log-probabilities of choices, and of a second pass over each pair's texts."""

    def num_tokens(self, batch):
        return batch["weights"].sum()

    def weight(self, batch):
        return batch["weights"].sum()

    def __call__(self, graphdef, params, borrowed, batch, keys_B=None):
        model = nnx.merge(graphdef, params)

        def log_probs(tokens_BT):
            hidden = model(tokens_BT, dropout_keys_B=keys_B).hidden
            return jax.nn.log_softmax(model.logits(hidden))

        of_choices = jnp.take_along_axis(log_probs(batch["tokens"]), batch["choices"], axis=-1)
        loss = -(batch["weights"][..., None] * of_choices).sum()

        for which in range(2):
            texts = batch["pairs"][:, which]
            of_texts = jnp.take_along_axis(log_probs(texts), texts[..., None], axis=-1)[..., 0]
            loss += ((-1) ** which * batch["weights"] * of_texts).sum()

        # What is not of positions is in its own order.
        order = jnp.arange(batch["score"].shape[1])
        num_rows = jnp.float32(len(batch["score"]))
        score = Sum((batch["score"] * order[None]).sum(), num_rows)
        return Terms(loss, {"score": score})


def choice_batches():
    return TrainingBatches(ChoiceSource(), (Stage(0, ROWS, LENGTH),), seed=3)


def test_placing_and_splitting_go_by_names():
    mesh = create_mesh(sizes("data=2 fsdp=2 context=2"), jax.devices())
    batches = choice_batches()
    batch = batches(5, range(ROWS))
    placed = put_batch(batch, batches.dims, rows=range(ROWS), mesh=mesh, global_batch_size=ROWS)
    order = zigzag(LENGTH, 2)

    np.testing.assert_array_equal(placed["choices"], batch["choices"][:, order])
    np.testing.assert_array_equal(placed["pairs"], batch["pairs"][:, :, order])
    np.testing.assert_array_equal(placed["score"], batch["score"])
    np.testing.assert_array_equal(placed["row_hash"], batch["row_hash"])
    assert placed["choices"].sharding.shard_shape((ROWS, LENGTH, 3)) == (4, 4, 3)
    assert placed["pairs"].sharding.shard_shape((ROWS, 2, LENGTH)) == (4, 2, 4)
    assert placed["score"].sharding.shard_shape((ROWS, LENGTH)) == (4, 8)

    with jax.set_mesh(mesh):
        dims = batches.dims
        parts = jax.jit(lambda tree: split_rows(tree, dims, 4))(placed)
        for name, part in parts.items():
            expected = np.stack([np.asarray(placed[name])[i::4] for i in range(4)])
            np.testing.assert_array_equal(part, expected)
            there = named(mesh, None, *dims[name])
            assert part.sharding.is_equivalent_to(there, part.ndim), name


def choice_step(mesh_text, accumulation):
    """The state and the metrics after a step of the made-up source and objective."""
    mesh_sizes = sizes(mesh_text)
    num_devices = mesh_sizes.data * mesh_sizes.fsdp * mesh_sizes.context * mesh_sizes.pipeline
    mesh = create_mesh(mesh_sizes, jax.devices()[:num_devices])
    model = ModelConfig(
        vocab_size=50, max_seq_length=LENGTH, n_layers=2, n_heads=2, n_embd=16, dropout=0.1
    )
    training = dataclasses.replace(TRAINING, gradient_accumulation_steps=accumulation)
    config = Config(model=model, training=training)

    layout = Layout.of(mesh, ROWS // accumulation // Layout.of(mesh).rows)
    graphdef, initialise, _ = build(model, layout=layout)
    optimizer = create_optimizer(training)
    batches = choice_batches()

    with jax.set_mesh(mesh):
        step = make_train_step(graphdef, optimizer, config, Chosen(), batches.dims)
        state = jax.jit(lambda: create_state(initialise, optimizer, seed=0, is_float16=False))()
        batch = batches(0, range(ROWS))
        placed = put_batch(batch, batches.dims, rows=range(ROWS), mesh=mesh, global_batch_size=ROWS)
        placed["stop"] = put_flag(False, mesh)
        return jax.device_get(jax.jit(step)(state, {}, placed))


@pytest.mark.parametrize(
    ("mesh_text", "accumulation"),
    [("data=2 fsdp=2 context=2", 4), ("data=8", 2), ("pipeline=2 data=2 context=2", 2)],
)
def test_a_step_with_other_fields_is_the_same_on_any_mesh(mesh_text, accumulation):
    one, one_metrics = choice_step("data=1", 1)
    state, metrics = choice_step(mesh_text, accumulation)
    assert_close(metrics["loss"], one_metrics["loss"], rtol=1e-5)
    assert_close(metrics["terms"], one_metrics["terms"], rtol=1e-5)
    assert metrics["batch_hash"] == one_metrics["batch_hash"]
    assert_close(state.opt_state, one.opt_state, rtol=1e-3, atol=1e-6)
