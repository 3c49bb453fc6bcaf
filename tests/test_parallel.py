"""Any mesh of eight devices gives the loss, the gradients and the first state of one device."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from test_training import TRAINING, assert_close, make_batch

from l1_jax.config import Config, ModelConfig, ParallelismConfig
from l1_jax.errors import UserError
from l1_jax.model.transformer import build
from l1_jax.parallel.mesh import create_mesh, select_devices
from l1_jax.parallel.sharding import batch_shards, check_divisible, named, process_rows, put_batch
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.state import create_state, place_state
from l1_jax.training.step import make_train_step

MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(sizes) == 8]
MODEL = ModelConfig(vocab_size=100, max_seq_length=8, n_layers=2, n_heads=8, n_embd=16, dropout=0.1)
ROWS = 32
BATCH = make_batch((np.random.default_rng(2).random((ROWS, 8)) < 0.6).astype(np.float32), ROWS)


def run_step(sizes, accumulation=1):
    """The state before and after one step on a mesh, and the metrics, all on the host."""
    mesh = create_mesh(ParallelismConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        graphdef, initialise, axes = build(MODEL)
        optimizer = create_optimizer(TRAINING)
        create = functools.partial(create_state, initialise, optimizer, 0, False)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, place_state(jax.eval_shape(create), optimizer, axes, mesh))
        state = jax.jit(create, out_shardings=shardings)()
        before = jax.device_get(state)
        training = dataclasses.replace(TRAINING, gradient_accumulation_steps=accumulation)
        step = make_train_step(graphdef, optimizer, Config(model=MODEL, training=training), batch_shards(mesh))
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
        state, metrics = jitted(state, put_batch(BATCH, mesh, ROWS))
        after = jax.device_get((state, metrics))
        jitted(state, put_batch(BATCH, mesh, ROWS))
        assert jitted._cache_size() == 1, "the second step compiled again: a sharding is not pinned"
        return before, *after


@pytest.fixture(scope="module")
def one_device():
    return run_step((1, 1, 1))


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_any_mesh_is_one_device(sizes, accumulation, one_device):
    before, after, metrics = run_step(sizes, accumulation)
    assert_close(before, one_device[0], rtol=0)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], one_device[2][name], rtol=1e-5, err_msg=name)
    # Adam's first moment after one step is a tenth of the clipped gradient; each leaf to 1e-4 of its largest.
    moments, expected = after.opt_state[1].mu, one_device[1].opt_state[1].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), moments, expected)


def test_parameters_and_moments_lie_in_shards():
    mesh = create_mesh(ParallelismConfig(1, 4, 2), jax.devices())
    _, initialise, axes = build(MODEL)
    optimizer = create_optimizer(TRAINING)
    create = functools.partial(create_state, initialise, optimizer, 0, False)
    placed = place_state(jax.eval_shape(create), optimizer, axes, mesh)

    def share(leaf):
        return np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size

    for params in (placed.params, placed.opt_state[1].mu, placed.opt_state[1].nu):
        assert share(params["token_embedding"]) == 1 / 8
        assert share(params["position_embedding"]) == 1 / 4
        for layer in ("attention", "mlp"):
            for linear in params["blocks"][layer].values():
                assert share(linear["kernel"]) == 1 / 8
    assert share(placed.step) == 1


def test_rows_of_a_process_cover_the_batch_once():
    mesh = create_mesh(ParallelismConfig(2, 2, 2), jax.devices())
    np.testing.assert_array_equal(process_rows(mesh, 12), np.arange(12))  # one process holds them all


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "data 3 x fsdp 1 x tensor 1 needs 3 devices, and there are 8"),
        ((16, 1, 1), "needs 16 devices, and there are 8"),
        ((-1, 3, 1), "3 does not divide 8"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        create_mesh(ParallelismConfig(*sizes), jax.devices())


def test_the_free_axis_takes_the_rest():
    assert dict(create_mesh(ParallelismConfig(2, -1, 2), jax.devices()).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(n_heads=3, n_embd=48), "model.n_heads 3 is not divisible by parallelism.tensor 2"),
        (ModelConfig(n_heads=2, n_embd=10), "model.n_embd 10 is not divisible by parallelism.fsdp 4"),
        (ModelConfig(n_heads=2, n_embd=8, n_inner=9), "model.n_inner 9 is not divisible by parallelism.tensor 2"),
    ],
)
def test_a_model_that_does_not_divide(model, message):
    with pytest.raises(UserError, match=message):
        check_divisible(model, create_mesh(ParallelismConfig(1, 4, 2), jax.devices()))


def test_a_vocabulary_that_does_not_divide():
    mesh = create_mesh(ParallelismConfig(1, 1, 3), jax.devices()[:3])
    with pytest.raises(UserError, match=r"vocab_size, padded to 512 is not divisible by parallelism\.tensor 3"):
        check_divisible(ModelConfig(vocab_size=500, n_heads=3, n_embd=9), mesh)


def test_an_absent_device_is_refused():
    for device in ("gpu", "cuda", "tpu"):
        with pytest.raises(UserError, match=f"the device '{device}' is asked for"):
            select_devices(device)
    assert len(select_devices("cpu")) == len(select_devices("auto")) == 8
