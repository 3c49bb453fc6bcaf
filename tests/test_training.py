"""The step against hand-made updates, and against itself in other pieces."""

import dataclasses
import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from l1_jax.config.resolve import Facts, resolve, resolve_batch, resolve_warmup, rows_of_stream
from l1_jax.config.schema import Config
from l1_jax.console import log
from l1_jax.data.batches import batch_fields
from l1_jax.data.sources import dims_of, token_fields
from l1_jax.errors import UserError
from l1_jax.model.flops import flops_per_token
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.chunks import MAX_LOGITS_BYTES, choose_num_chunks
from l1_jax.objectives.cross_entropy import loss_sum
from l1_jax.objectives.next_token import NextToken
from l1_jax.parallel.mesh import abstract_mesh
from l1_jax.run import speed
from l1_jax.run.speed import SpeedMeter
from l1_jax.training.health import LOSS_SCALE_GROWTH_STEPS
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.schedule import learning_rate_schedule
from l1_jax.training.section import TrainingConfig
from l1_jax.training.state import create_state
from l1_jax.training.step import make_train_step

MODEL = ModelConfig(vocab_size=100, max_seq_length=8, n_layers=2, n_heads=2, n_embd=16, dropout=0.1)
NEXT_TOKEN = NextToken()
DIMS = dims_of(batch_fields(token_fields(8, document_mask=True)))
TRAINING = TrainingConfig(
    learning_rate=0.01, min_learning_rate=0.001, warmup_steps=4, schedule_steps=20, weight_decay=0.1
)


def make_batch(weights=None, rows=8):
    tokens = np.random.default_rng(0).integers(0, 100, (rows, 9)).astype(np.int32)
    weights = np.ones((rows, 8), np.float32) if weights is None else weights
    hashes = np.arange(rows, dtype=np.uint32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "row_hash": hashes,
        "stop": np.zeros(rows, bool),
    }


def setup(*, float16=False, accumulation=1, model=MODEL, training=TRAINING, objective=NEXT_TOKEN):
    graphdef, initialise, _ = build(model, jnp.float16 if float16 else jnp.float32)
    optimizer = create_optimizer(training)
    state = jax.jit(lambda: create_state(initialise, optimizer, seed=0, is_float16=float16))()
    config = Config(
        model=model,
        training=dataclasses.replace(training, gradient_accumulation_steps=accumulation),
    )
    step = jax.jit(make_train_step(graphdef, optimizer, config, objective, DIMS))
    return graphdef, state, lambda state, batch: step(state, {}, batch)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_accumulation_is_the_whole_batch_with_uneven_weights():
    weights = (np.random.default_rng(1).random((8, 8)) < 0.4).astype(np.float32) * 2.5
    weights[0] = 0
    results = []
    for accumulation in (1, 4):
        _, state, step = setup(accumulation=accumulation)
        results.append(step(state, make_batch(weights)))
    (whole, whole_metrics), (parts, part_metrics) = results
    assert_close(part_metrics, whole_metrics, rtol=1e-5)
    assert whole_metrics["tokens"] == weights.sum()
    # Adam's first update is the sign of the gradient: compare the moments, which are the gradients themselves.
    assert_close(parts.opt_state, whole.opt_state, rtol=1e-3, atol=1e-7)


def test_loss_is_the_weighted_mean_of_the_batch():
    weights = np.zeros((8, 8), np.float32)
    weights[2, 3], weights[5, 1] = 1, 3
    model = dataclasses.replace(MODEL, dropout=0.0)
    graphdef, state, step = setup(model=model)
    batch = make_batch(weights)
    bound = nnx.merge(graphdef, state.params)
    log_p = jax.nn.log_softmax(bound.logits(bound(batch["tokens"])[0])[..., :100])
    expected = -(log_p[2, 3, batch["targets"][2, 3]] + 3 * log_p[5, 1, batch["targets"][5, 1]]) / 4
    assert step(state, batch)[1]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_chunked_loss_is_the_plain_loss():
    graphdef, state, _ = setup()
    batch = make_batch()

    def loss(params, num_chunks):
        model = nnx.merge(graphdef, params)
        return loss_sum(
            model, model(batch["tokens"]).hidden, batch["targets"], batch["weights"], num_chunks
        ).nll

    plain, chunked = (jax.value_and_grad(loss)(state.params, n) for n in (1, 4))
    assert_close(chunked, plain, rtol=1e-4, atol=1e-5)


def test_logits_are_cut_only_where_they_are_large():
    assert choose_num_chunks(8, 64, 384) == 1
    assert choose_num_chunks(8, 1024, 50304) == 8  # 1.5 GiB of logits in parts of at most 256 MiB
    assert choose_num_chunks(8, 1000, 50304) == 8  # 7 would do, and 8 leave nothing over
    assert choose_num_chunks(8, 1021, 50304) == 7  # a prime, so one part has less
    assert choose_num_chunks(8, 2 * 509, 50304) == 7
    assert choose_num_chunks(4000, 1021, 50304) == 1021  # not even two positions fit


@pytest.mark.parametrize("vocab", [384, 50304])
def test_parts_fit_and_are_no_more_than_twice_as_many_as_needed(vocab):
    for rows, length in itertools.product((1, 8, 100), (*range(1, 300), 1021, 1024, 4099)):
        num_chunks = choose_num_chunks(rows, length, vocab)
        most = MAX_LOGITS_BYTES // (4 * vocab * rows)
        assert -(-length // num_chunks) <= most
        assert num_chunks <= 2 * -(-length // most)
        if length & (length - 1) == 0:
            assert length % num_chunks == 0


def test_adamw_is_loshchilov_and_hutters():
    """Algorithm 2 of arXiv:1711.05101, by hand, over three steps; biases, norms and positions do not decay."""
    config = dataclasses.replace(TRAINING, max_grad_norm=None)
    optimizer = create_optimizer(config)
    params = {
        name: jnp.full((2, 2), 0.5)
        for name in ("kernel", "bias", "scale", "token_embedding", "position_embedding")
    }
    state = optimizer.init(params)
    m = v = 0.0
    for t, g in enumerate((0.3, -0.2, 0.1), start=1):
        updates, state = optimizer.update(
            jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params), state, params
        )
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        adam = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        for name, update in updates.items():
            decay = 0.1 * 0.5 if name in ("kernel", "token_embedding") else 0.0
            np.testing.assert_allclose(update, adam + decay, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    config = dataclasses.replace(TRAINING, max_grad_norm=1.0, weight_decay=0.0)
    optimizer = create_optimizer(config)
    params = {"kernel": jnp.zeros(2), "bias": jnp.zeros(1)}
    _, state = optimizer.update(
        {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}, optimizer.init(params), params
    )
    np.testing.assert_allclose(state[1].mu["bias"], 0.1 * 4 / 5, rtol=1e-6)


def test_schedule():
    rate = learning_rate_schedule(TRAINING)
    np.testing.assert_allclose([rate(s) for s in (1, 2, 4)], [0.0025, 0.005, 0.01], rtol=1e-6)
    assert rate(12) == pytest.approx((0.01 + 0.001) / 2)  # half-way down the cosine
    assert rate(20) == pytest.approx(0.001)
    assert rate(99) == pytest.approx(0.001)
    assert (resolve_warmup("auto", 100), resolve_warmup("auto", 10**6)) == (10, 500)
    with pytest.raises(UserError, match="warmup_steps 20"):
        resolve_warmup(20, 20)


def test_the_step_applies_the_schedule_and_counts():
    _, state, step = setup()
    rates = []
    for _ in range(3):
        state, metrics = step(state, make_batch())
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.0075], rtol=1e-6)
    assert state.step == 3
    assert metrics["batch_hash"] == sum(range(8))


def test_a_step_that_is_not_finite_changes_only_its_number():
    _, state, step = setup(training=dataclasses.replace(TRAINING, on_nonfinite="skip"))
    batch = make_batch()
    batch["weights"][0, 0] = np.inf
    after, metrics = step(state, batch)
    assert not metrics["finite"]
    assert after.step == 1
    assert_close((after.params, after.opt_state), (state.params, state.opt_state), rtol=0)


def test_float16_scales_its_loss():
    _, state, step = setup(float16=True)
    _, plain_state, plain_step = setup()
    expected_metrics = plain_step(plain_state, make_batch())[1]
    after, metrics = step(state, make_batch())
    assert metrics["loss"] == pytest.approx(float(expected_metrics["loss"]), rel=1e-2)
    assert metrics["grad_norm"] == pytest.approx(float(expected_metrics["grad_norm"]), rel=2e-2)
    assert (after.loss_scale.scale, after.loss_scale.good_steps) == (2.0**16, 1)

    def with_scale(scale, good):
        return dataclasses.replace(
            state,
            loss_scale=dataclasses.replace(
                state.loss_scale, scale=jnp.float32(scale), good_steps=jnp.int32(good)
            ),
        )

    overflowed, metrics = step(with_scale(2.0**40, 5), make_batch())
    assert not metrics["finite"]
    assert (overflowed.loss_scale.scale, overflowed.loss_scale.good_steps) == (2.0**39, 0)
    assert_close(overflowed.params, state.params, rtol=0)
    grown, _ = step(with_scale(2.0**10, LOSS_SCALE_GROWTH_STEPS - 1), make_batch())
    assert (grown.loss_scale.scale, grown.loss_scale.good_steps) == (2.0**11, 0)


def test_speed_and_utilisation_by_hand(monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 24.0])  # made; paused and resumed; read
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    meter = SpeedMeter(flops_per_token(1000, MODEL), peak_flops=1e6)
    meter.tokens += 400
    with meter.paused():
        pass
    # 20 seconds of work; 6 N + 12 L D T = 6 * 1000 + 12 * 2 * 16 * 8 = 9072 FLOPs a token
    assert meter.read() == pytest.approx(
        {"perf/tokens_per_second": 20.0, "perf/mfu": 20.0 * 9072 / 1e6}
    )


def test_dropout_differs_by_step_and_seed_alone():
    _, state, step = setup()
    frozen = dataclasses.replace(state, step=jnp.int32(1))
    losses = [float(step(s, make_batch())[1]["loss"]) for s in (state, state, frozen)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("keys", "shards", "resumed", "expected"),
    [
        ({}, 1, None, (8, 1, 8)),
        ({"batch_size": 4, "gradient_accumulation_steps": 3}, 2, None, (4, 3, 24)),
        ({"global_batch_size": 64}, 4, None, (16, 1, 64)),
        ({"global_batch_size": 64, "batch_size": 5}, 4, None, (4, 4, 64)),
        ({"batch_size": 8}, 1, 64, (8, 8, 64)),  # resumed on one device what ran on eight
        ({"global_batch_size": 64}, 1, 64, (64, 1, 64)),
        (
            {"batch_size": 4, "gradient_accumulation_steps": 3, "global_batch_size": 24},
            2,
            None,
            (4, 3, 24),
        ),
    ],
)
def test_batch_arithmetic(keys, shards, resumed, expected):
    assert resolve_batch(TrainingConfig(**keys), shards, resumed) == expected


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"Set training\.global_batch_size to 9"):
        resolve_batch(TrainingConfig(global_batch_size=10), 3, None)


def test_tensorboard_leaves_torch_alone(tmp_path):
    code = "import pathlib, sys; from l1_jax.run.tracking import Board; Board(pathlib.Path(sys.argv[1]), 1)"
    command = [sys.executable, "-c", f"{code}; print('torch' in sys.modules)", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def resolved(num_rows, **training):
    """The training section of a run on `num_rows` sequences, on one device."""
    config = Config(MODEL).replace("training", precision="float32", **training)
    tokens = num_rows * MODEL.max_seq_length + 1
    mesh = abstract_mesh(config.parallelism, 1)
    return resolve(
        config, Facts(MODEL.vocab_size, rows_of_stream(tokens), dict(mesh.shape), "cpu")
    ).training


def test_epochs_are_counted_exactly():
    for tenths in range(1, 60):
        rounded_up = -(-tenths * 800 // (10 * 8))
        assert resolved(800, num_epochs=tenths / 10, batch_size=8).max_steps == rounded_up
    assert resolved(800, num_epochs=1e-9, batch_size=8).max_steps == 1
    assert resolved(801, num_epochs=1, batch_size=8).max_steps == 101  # part of a batch is a step


def test_a_batch_larger_than_the_data_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(log, "propagate", True)
    assert resolved(8, num_epochs=3, batch_size=8).max_steps == 3
    assert not caplog.records
    assert resolved(10, num_epochs=3, batch_size=37).max_steps == 1
    assert "a step is 3.7 epochs: the global batch is 37 sequences" in caplog.text
    assert "the only step is at the floor of the schedule. Lower training.batch_size" in caplog.text
