"""A second of everything: a part of a block, an objective, the hidden states of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parallel import MODEL, ROWS, batch, run_step, sizes
from test_training import assert_close

from l1_jax.model import block as block_module
from l1_jax.model.context import Sum
from l1_jax.model.layers import MLP
from l1_jax.model.transformer import build
from l1_jax.objectives.cross_entropy import loss_sum
from l1_jax.objectives.next_token import NextToken
from l1_jax.parallel.mesh import create_mesh


class BusyMLP(MLP):
    """An MLP that is to give small numbers: each row adds their squares, its weight a position."""

    def __call__(self, x_BTD, context):
        y_BTD, _ = super().__call__(x_BTD, context)
        squares_B = 1e4 * jnp.square(y_BTD.astype(jnp.float32)).sum(axis=(1, 2))
        return y_BTD, {"busy": Sum(squares_B, jnp.full(len(x_BTD), x_BTD.shape[1], jnp.float32))}


@pytest.fixture
def without():
    """The metrics of a step of the model as it is."""
    return run_step("data=1", 1, 0.1)[1]


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.setitem(block_module.MLPS, "gelu", BusyMLP)


def forward(model, dtype=jnp.float32, remat="none"):
    graphdef, initialise, _ = build(model, dtype, remat)
    params = initialise(jax.random.key(0))
    tokens = batch()["tokens"]
    return nnx.merge(graphdef, params)(tokens)


def test_what_a_part_adds_is_the_sum_over_its_layers(busy):
    plain = dataclasses.replace(MODEL, dropout=0.0)
    expected = forward(dataclasses.replace(plain, scan_layers=False)).sums["busy"]
    assert float(expected.weight) == MODEL.n_layers * ROWS * MODEL.max_seq_length
    for model, remat in (
        (plain, "none"),
        (plain, "full"),
        (dataclasses.replace(plain, scan_layers=False), "dots"),
    ):
        assert_close(forward(model, remat=remat).sums["busy"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [("data=1", 4), ("data=8", 4), ("fsdp=4 tensor=2", 1), ("pipeline=2 context=2 tensor=2", 4)],
)
def test_an_objective_with_it_is_the_same_on_any_mesh(without, busy, mesh, accumulation):
    # Not from the cache of `run_step`, which other tests share.
    one, one_metrics = run_step.__wrapped__("data=1", 1, 0.1)
    state, metrics = run_step.__wrapped__(mesh, accumulation, 0.1)
    assert set(metrics["terms"]) == {"busy"}
    assert metrics["terms"]["busy"] > 0
    assert_close(metrics["terms"], one_metrics["terms"], rtol=1e-5)
    assert_close(metrics["loss"], one_metrics["loss"], rtol=1e-5)
    assert_close(metrics["grad_norm"], one_metrics["grad_norm"], rtol=1e-4)
    assert_close(state.opt_state, one.opt_state, rtol=1e-3, atol=1e-6)

    # It is minimised, and not only logged; the loss in the log is that of the tokens.
    assert_close(metrics["loss"], without["loss"], rtol=1e-5)
    assert metrics["grad_norm"] > 2 * without["grad_norm"]


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_the_z_loss_by_hand(num_chunks):
    graphdef, initialise, _ = build(dataclasses.replace(MODEL, logit_softcap=5.0))
    params = initialise(jax.random.key(0))
    params["token_embedding"] *= 30
    rows = batch()

    def ours(params):
        model = nnx.merge(graphdef, params)
        hidden = model(rows["tokens"]).hidden
        sums = loss_sum(model, hidden, rows["targets"], rows["weights"], num_chunks, z_loss=0.1)
        return sums.nll + sums.z_loss, sums

    def plain(params):
        model = nnx.merge(graphdef, params)
        logits = model.logits(model(rows["tokens"]).hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        target_logits = jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]
        nll = (rows["weights"] * (log_z - target_logits)).sum()
        z_loss = 0.1 * (rows["weights"] * log_z**2).sum()
        return nll + z_loss, (nll, z_loss)

    (_, sums), grads = jax.value_and_grad(ours, has_aux=True)(params)
    (_, expected_sums), expected = jax.value_and_grad(plain, has_aux=True)(params)
    assert_close(tuple(sums), expected_sums, rtol=1e-5)
    assert_close(grads, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [("data=8", 4), ("fsdp=4 tensor=2", 1), ("pipeline=2 context=2 tensor=2", 4)],
)
def test_a_z_loss_is_the_same_on_any_mesh(mesh, accumulation):
    objective = NextToken(z_loss=0.1)
    one, one_metrics = run_step("data=1", 1, 0.1, objective=objective)
    state, metrics = run_step.__wrapped__(mesh, accumulation, 0.1, objective=objective)
    assert_close(metrics["terms"]["z_loss"], one_metrics["terms"]["z_loss"], rtol=1e-5)
    assert_close(metrics["loss"], one_metrics["loss"], rtol=1e-5)
    assert_close(state.opt_state, one.opt_state, rtol=1e-3, atol=1e-6)

    # The loss in the log is that of the tokens alone, and can be compared.
    _, without = run_step("data=1", 1, 0.1)
    assert_close(metrics["loss"], without["loss"], rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_hidden_states_of_layers(scan_layers):
    """Of the last layer before the final norm; of none by default."""
    model = dataclasses.replace(MODEL, dropout=0.0, scan_layers=scan_layers)
    graphdef, initialise, _ = build(model)
    params = initialise(jax.random.key(0))
    network = nnx.merge(graphdef, params)
    tokens = batch()["tokens"]
    output = network(tokens, taps=(0, 2, 3))
    assert_close(network.final_norm(output.taps[2]), output.hidden, rtol=1e-5, atol=1e-5)
    assert network(tokens).taps == ()

    first = jax.tree.map(lambda leaf: leaf[:1], params["blocks"])
    shorter = build(dataclasses.replace(model, n_layers=1))[0]
    alone = nnx.merge(shorter, params | {"blocks": first})(tokens, taps=(0,))
    assert_close(alone.taps[0], output.taps[0], rtol=1e-5, atol=1e-5)


def test_the_size_of_a_head_is_a_key_of_its_own():
    model = dataclasses.replace(MODEL, head_size=6, dropout=0.0)
    graphdef, initialise, _ = build(model)
    params = initialise(jax.random.key(0))
    assert params["blocks"]["attention"]["qkv"]["kernel"].shape == (4, 16, 3, 8, 6)
    assert params["blocks"]["attention"]["out"]["kernel"].shape == (4, 8, 6, 16)
    assert nnx.merge(graphdef, params)(batch()["tokens"]).hidden.shape == (ROWS, 16, 16)


def test_attention_drops_at_a_rate_of_its_own():
    keys = jax.random.split(jax.random.key(1), ROWS)
    tokens = batch()["tokens"]

    def hidden(**rates):
        model = dataclasses.replace(MODEL, **rates)
        graphdef, initialise, _ = build(model)
        network = nnx.merge(graphdef, initialise(jax.random.key(0)))
        return network(tokens, dropout_keys_B=keys).hidden

    as_dropout = hidden(dropout=0.1)
    np.testing.assert_array_equal(hidden(dropout=0.1, attention_dropout=0.1), as_dropout)
    assert not np.array_equal(hidden(dropout=0.1, attention_dropout=0.0), as_dropout)
    still = hidden(dropout=0.0)
    assert not np.array_equal(hidden(dropout=0.0, attention_dropout=0.5), still)


def test_kernels_run_without_dropout_of_weights():
    from l1_jax.config.schema import Config
    from l1_jax.model.backends import obstacle

    config = Config(model=dataclasses.replace(MODEL, max_seq_length=128, attention_dropout=0.0))
    mesh = create_mesh(sizes("data=1"), jax.devices()[:1])
    assert config.model.dropout > 0
    assert obstacle("splash", config, mesh, config.model.attention_rate, "tpu") is None
    why = obstacle("splash", config, mesh, MODEL.attention_rate, "tpu")
    assert "model.attention_dropout" in why
