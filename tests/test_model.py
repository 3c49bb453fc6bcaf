"""The model against transformers' GPT-2, against its own other paths, and by its gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.random import threefry_2x32

from l1_jax.data.sources import make_batch
from l1_jax.model.attend import attend, attend_in_blocks, causal_mask
from l1_jax.model.dropout import dropout, threefry
from l1_jax.model.flops import count_parameters
from l1_jax.model.layers import contract, kernel_gradient, turned_kernel_gradient
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build

CONFIG = ModelConfig(
    vocab_size=200, max_seq_length=16, n_layers=3, n_heads=4, n_embd=32, dropout=0.0
)
TOKENS = np.random.default_rng(0).integers(0, 200, (2, 16)).astype(np.int32)


@pytest.fixture(params=["plain", "blocked"])
def attention(request, monkeypatch):
    monkeypatch.setattr(
        "l1_jax.model.attend.BLOCK", 6
    )  # so that there are several, and a shorter one
    return request.param


def make(config=CONFIG, remat="none", seed=0, attention="plain", dtype=jnp.float32):
    graphdef, initialise, _ = build(config, dtype, remat=remat, attention=attention)
    return graphdef, jax.jit(initialise)(jax.random.key(seed))


def logits(graphdef, params, tokens, *inputs):
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens, *inputs)[0])


def test_equals_transformers_gpt2(attention):
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=200, n_positions=16, n_layer=3, n_head=4, n_embd=32, activation_function="gelu",
            resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        )
    ).eval()  # fmt: skip
    graphdef, params = make(attention=attention)
    assert count_parameters(CONFIG, params) == sum(p.numel() for p in theirs.parameters())

    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params
    )
    weights = {
        "wte.weight": params["token_embedding"][:200],
        "wpe.weight": params["position_embedding"],
    }
    weights |= {
        "ln_f.weight": params["final_norm"]["scale"],
        "ln_f.bias": params["final_norm"]["bias"],
    }
    for i in range(3):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        names = {
            "ln_1": block["attention_norm"], "ln_2": block["mlp_norm"], "attn.c_attn": block["attention"]["qkv"],
            "attn.c_proj": block["attention"]["out"], "mlp.c_fc": block["mlp"]["up"],
            "mlp.c_proj": block["mlp"]["down"],
        }  # fmt: skip
        for name, layer in names.items():
            for ours, value in layer.items():
                weights[f"h.{i}.{name}.{'bias' if ours == 'bias' else 'weight'}"] = value
    state = theirs.transformer.state_dict()
    for name, value in weights.items():
        state[name] = torch.from_numpy(np.array(value).reshape(state[name].shape))
    theirs.transformer.load_state_dict(state)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(logits(graphdef, params, TOKENS)[..., :200], expected, atol=1e-4)


def test_initial_weights_are_gpt2s():
    _, params = make(dataclasses.replace(CONFIG, n_embd=128))
    block = params["blocks"]
    assert np.std(params["token_embedding"]) == pytest.approx(0.02, rel=0.02)
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.02)
    for residual in (block["mlp"]["down"], block["attention"]["out"]):
        assert np.std(residual["kernel"]) == pytest.approx(0.02 / np.sqrt(6), rel=0.02)
        assert not residual["bias"].any()
    assert not np.array_equal(block["mlp"]["up"]["kernel"][0], block["mlp"]["up"]["kernel"][1])


def test_a_position_sees_itself_and_what_is_before(attention):
    graphdef, params = make(attention=attention)

    def output_at(embedding, position):
        return nnx.merge(graphdef, params | {"position_embedding": embedding})(TOKENS[:1])[0][
            0, position
        ].sum()

    for position in (0, 7, 15):
        grad = jax.grad(output_at)(params["position_embedding"], position)
        reached = np.abs(grad).sum(axis=1) > 0
        np.testing.assert_array_equal(reached, np.arange(16) <= position)


@pytest.mark.slow
def test_scan_is_the_loop_and_remat_changes_nothing(attention):
    def loss_and_grads(scan, remat):
        config = dataclasses.replace(CONFIG, scan_layers=scan, dropout=0.2)
        graphdef, params = make(config, remat, attention=attention)
        keys = jax.random.split(jax.random.key(3), 2)

        def loss(params):
            model = nnx.merge(graphdef, params)
            return model.logits(model(TOKENS, dropout_keys_B=keys)[0])[..., :200].var()

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = loss_and_grads(True, "none")
    for scan, remat in (
        (False, "none"),
        (True, "full"),
        (True, "dots"),
        (True, "dots_no_batch"),
        (False, "full"),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            loss_and_grads(scan, remat),
            expected,
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_remat_keeps_less(attention, dtype):
    """The policies differ in what the backward pass finds stored."""

    def stored_bytes(remat):
        graphdef, params = make(remat=remat, attention=attention, dtype=dtype)
        _, backward = jax.eval_shape(
            lambda p: jax.vjp(lambda p: logits(graphdef, p, TOKENS), p), params
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    full, no_batch, dots, none = (
        stored_bytes(remat) for remat in ("full", "dots_no_batch", "dots", "none")
    )
    assert full < no_batch < dots < none
    attention_outputs = (
        3 * TOKENS.size * (32 * dtype.dtype.itemsize + 4 * 4 * (attention == "blocked"))
    )
    assert dots - no_batch == pytest.approx(attention_outputs, rel=0.05)


def test_packed_documents_are_as_if_alone(attention):
    graphdef, params = make(attention=attention)
    eot, docs = 199, [np.arange(1, 6), np.arange(20, 24), np.arange(40, 44)]
    row = np.concatenate([[eot, *doc] for doc in docs] + [[eot]]).astype(np.int32)[None]
    packed = make_batch(row, eot)
    together = logits(
        graphdef, params, packed["tokens"], packed["positions"], packed["segment_ids"]
    )[0]
    alone = [logits(graphdef, params, np.array([[eot, *doc]], np.int32))[0] for doc in docs]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_padding_of_the_vocabulary_is_never_likely():
    out = logits(*make(), TOKENS)
    assert out.shape[-1] == 256
    assert jax.nn.softmax(out)[..., 200:].max() == 0


def test_compute_type():
    graphdef, initialise, _ = build(CONFIG, jnp.bfloat16)
    params = initialise(jax.random.key(0))
    x = nnx.merge(graphdef, params)(TOKENS).hidden
    assert x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(
        logits(graphdef, params, TOKENS)[..., :200], logits(*make(), TOKENS)[..., :200], atol=0.02
    )


def test_dropout_belongs_to_the_row_and_the_position():
    keys, order = jax.random.split(jax.random.key(0), 4), np.arange(1000)
    x = jnp.ones((4, 1000))
    whole = dropout(x, 0.25, keys, order)
    np.testing.assert_array_equal(whole[2:], dropout(x[2:], 0.25, keys[2:], order))
    np.testing.assert_array_equal(whole[:, ::-1], dropout(x, 0.25, keys, order[::-1]))
    np.testing.assert_allclose(np.unique(whole), [0, 1 / 0.75])
    assert (whole == 0).mean() == pytest.approx(0.25, abs=0.03)
    assert not np.array_equal(whole[0], whole[1])


def test_the_bits_of_dropout_are_threefry():
    words = np.random.default_rng(0).integers(0, 2**32, (4, 50), dtype=np.uint32)
    both = threefry((words[0], words[1]), (words[2], words[3]))
    for row, *expected in zip(range(50), *both, strict=True):
        np.testing.assert_array_equal(threefry_2x32(words[:2, row], words[2:, row]), expected)


@pytest.mark.parametrize(
    ("length", "heads", "groups", "rate"), [(200, 2, 2, 0.0), (130, 4, 2, 0.2), (9, 2, 1, 0.2)]
)
@pytest.mark.parametrize("documents", [False, True])
def test_attention_in_blocks_is_the_plain_one(length, heads, groups, rate, documents):
    draw = np.random.default_rng(0).standard_normal
    q, d_y = draw((2, 2, length, heads, 8), np.float32)
    k, v = draw((2, 2, length, groups, 8), np.float32)
    order, keys = np.arange(length), jax.random.split(jax.random.key(1), 2)
    segments = jnp.asarray([order // 7, order // 80]) if documents else None
    mask = causal_mask(order[None], length)
    if documents:
        mask &= (segments[:, :, None] == segments[:, None])[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def both_ways(way, q, k, v):
        y, gradients = jax.vjp(way, q, k, v)
        return y, *gradients(d_y)

    plain = both_ways(lambda *qkv: attend(*qkv, mask, rate, keys, order), q, k, v)
    blocked = both_ways(lambda *qkv: attend_in_blocks(*qkv, segments, rate, keys), q, k, v)
    for a, b in zip(blocked, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_attention_in_blocks_holds_large_values_in_float16():
    """Weights are summed before they are divided: of 2048 equal ones that is 2048 times v."""
    q, v = jnp.zeros((1, 2048, 1, 8), jnp.float16), jnp.full((1, 2048, 1, 8), 40, jnp.float16)
    np.testing.assert_array_equal(attend_in_blocks(q, q, v, None, 0.0, None), v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("num_dims", "x", "kernel"), [(1, (2, 5, 8), (8, 3, 6)), (2, (2, 5, 4, 4), (4, 4, 6))]
)
def test_the_gradients_of_a_linear_map_are_autodiffs(dtype, num_dims, x, kernel):
    draw = np.random.default_rng(0).standard_normal
    x, kernel = jnp.asarray(draw(x), dtype), jnp.asarray(draw(kernel), jnp.float32)

    def plain(x, kernel):
        return jnp.tensordot(x, kernel.astype(x.dtype), num_dims)

    d_y = jnp.asarray(draw(plain(x, kernel).shape), dtype)
    ours = jax.vjp(functools.partial(contract, num_dims), x, kernel)[1](d_y)
    theirs = jax.vjp(plain, x, kernel)[1](d_y)
    ways = [way(2, x, d_y) for way in (kernel_gradient, turned_kernel_gradient)]
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for a, b in zip((*ours, *ways), (*theirs, theirs[1], theirs[1]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance)


def test_attention_in_blocks_is_no_less_exact_in_bfloat16():
    draw, order = np.random.default_rng(0).standard_normal, np.arange(300)
    q, k, v, d_y = draw((4, 1, 300, 2, 16), np.float32)
    mask = causal_mask(order[None], 300)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def both_ways(way, dtype):
        y, gradients = jax.vjp(way, *(x.astype(dtype) for x in (q, k, v)))
        return y, *gradients(d_y.astype(dtype))

    def plain(*qkv):
        return attend(*qkv, mask, 0.0, None, order)

    exact = both_ways(plain, jnp.float32)
    rounded = both_ways(plain, jnp.bfloat16)
    blocked = both_ways(lambda *qkv: attend_in_blocks(*qkv, None, 0.0, None), jnp.bfloat16)
    for true, a, b in zip(exact, blocked, rounded, strict=True):
        assert abs(a - true).mean() < 1.1 * abs(b - true).mean()
