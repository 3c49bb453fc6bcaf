"""The head's second form is the plain one, with its gradients, in parts and on any mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parallel import sizes
from test_training import assert_close

from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.log_probs import Prediction, kl_of_heads, token_log_probs
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.sharding import named

# The student has softcapped logits; the teacher is wider, and has a head of its own.
STUDENT = ModelConfig(
    vocab_size=100, max_seq_length=16, n_layers=1, n_heads=2, n_embd=8, logit_softcap=3.0
)
TEACHER = dataclasses.replace(STUDENT, n_embd=16, logit_softcap=None, tie_embeddings=False)
ROWS, LENGTH, NUM_IDS = 8, 16, 3
TABLES = {STUDENT: "token_embedding", TEACHER: "head"}


@functools.cache
def arrays(dtype=jnp.float32):
    """Hidden states and a table of each model, ids, and what the results are multiplied by."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    heads = {
        name: (jnp.asarray(draw(ROWS, LENGTH, model.n_embd), dtype), draw(128, model.n_embd))
        for name, model in (("student", STUDENT), ("teacher", TEACHER))
    }
    ids = rng.integers(0, 100, (ROWS, LENGTH, NUM_IDS)).astype(np.int32)

    # Twice the same id at a position.
    ids[..., 1] = ids[..., 0]
    return heads, ids, draw(ROWS, LENGTH, NUM_IDS)


@functools.cache
def parts(model):
    graphdef, initialise, _ = build(model)
    return graphdef, initialise(jax.random.key(0))


def with_table(model, table):
    graphdef, params = parts(model)
    return nnx.merge(graphdef, params | {TABLES[model]: table})


def log_probs(heads, ids, num_chunks):
    hidden, table = heads["student"]
    return token_log_probs(with_table(STUDENT, table), hidden, ids, num_chunks)


def plain_log_probs(heads, ids, _):
    hidden, table = heads["student"]
    logits = with_table(STUDENT, table).logits(hidden)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)


def predictions(heads):
    pairs = ((heads["teacher"], TEACHER), (heads["student"], STUDENT))
    return [Prediction(with_table(model, table), hidden) for (hidden, table), model in pairs]


def kl(heads, _, num_chunks, temperature=1.0):
    teacher, student = predictions(heads)
    return kl_of_heads(teacher, student, num_chunks, temperature)[..., None]


def plain_kl(heads, _, __, temperature=1.0):
    """Of the vocabulary alone, without padding."""
    log_p, log_q = (
        jax.nn.log_softmax(model.logits(hidden)[..., :100] / temperature)
        for model, hidden in predictions(heads)
    )
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1, keepdims=True)


def value_and_gradient(function, num_chunks=1):
    """A function of heads, ids and slopes: what `function` gives, and the gradient of its sum."""

    def total(heads, ids, slopes):
        values = function(heads, ids, num_chunks)
        return (values * slopes[..., : values.shape[-1]]).sum(), values

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@functools.cache
def expected(function, dtype=jnp.float32):
    return jax.device_get(value_and_gradient(function)(*arrays(dtype)))


COLD = functools.partial(kl, temperature=0.5), functools.partial(plain_kl, temperature=0.5)
WARM = functools.partial(kl, temperature=2.0), functools.partial(plain_kl, temperature=2.0)
FORMS = [(log_probs, plain_log_probs), (kl, plain_kl), COLD, WARM]


@pytest.mark.parametrize("num_chunks", [1, 4, 3])  # of 16 positions
@pytest.mark.parametrize(("form", "plain"), FORMS)
def test_the_plain_one(form, plain, num_chunks):
    found = value_and_gradient(form, num_chunks)(*arrays())
    assert_close(found, expected(plain), rtol=1e-5, atol=2e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(("form", "plain"), FORMS[:2])
def test_in_bfloat16(form, plain):
    """Values to rounding of float32; gradients are products of bfloat16."""
    found = value_and_gradient(form, 3)(*arrays(jnp.bfloat16))
    wanted = expected(plain, jnp.bfloat16)
    assert_close(found[0], wanted[0], rtol=1e-5, atol=2e-5)

    def same(a, b):
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())

    assert found[1]["student"][0].dtype == jnp.bfloat16
    assert found[1]["student"][1].dtype == jnp.float32
    jax.tree.map(same, found[1], wanted[1])


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize(
    "text", ["data=2 tensor=4", "data=2 context=2 fsdp=2", "pipeline=2 context=2 tensor=2"]
)
@pytest.mark.parametrize(("form", "plain"), FORMS[:2])
def test_on_any_mesh(form, plain, text, num_chunks):
    """Vocabulary, sequence and rows divided; 8 positions on a device in 3 parts."""
    mesh = create_mesh(sizes(text), jax.devices())
    with jax.set_mesh(mesh):
        hidden = named(mesh, "batch", "length", None)
        place = {name: (hidden, named(mesh, "vocab", "embed")) for name in ("student", "teacher")}
        placed = jax.device_put(arrays(), (place, hidden, hidden))
        compiled = value_and_gradient(form, num_chunks).lower(*placed).compile()
        assert_close(compiled(*placed), expected(plain), rtol=1e-4, atol=5e-5)

    # Nowhere are the logits of the whole vocabulary.
    if "tensor" in text:
        assert not re.search(r"\[[\d,]*128,?[\d,]*\]\S* all-gather", compiled.as_text())


def test_equal_heads_have_a_kl_of_0():
    hidden, table = arrays()[0]["student"]
    same = Prediction(with_table(STUDENT, table), hidden)
    np.testing.assert_allclose(kl_of_heads(same, same, temperature=0.1), 0.0, atol=1e-6)


@pytest.mark.parametrize("form", [log_probs, kl])
def test_no_logits_are_kept_for_the_backward_pass(form):
    heads, ids, slopes = arrays()
    _, backward = jax.eval_shape(lambda heads: jax.vjp(lambda x: form(x, ids, 4), heads), heads)
    largest = max(leaf.size for leaf in jax.tree.leaves(backward))
    assert largest <= max(leaf.size for leaf in jax.tree.leaves(heads))
    assert largest < ROWS * LENGTH * 100

    # And of no more than one part do they exist.
    needed = [
        value_and_gradient(form, num_chunks).lower(heads, ids, slopes).compile().memory_analysis()
        for num_chunks in (1, 8)
    ]
    one_part, eight_parts = (memory.temp_size_in_bytes for memory in needed)
    assert one_part > 4 * ROWS * LENGTH * 128
    assert eight_parts < one_part / 3


def test_a_teacher_without_gradient_costs_no_gradient():
    heads, ids, _ = arrays()

    def flops(stop):
        def total(heads):
            teacher = jax.tree.map(stop, heads["teacher"])
            return kl(heads | {"teacher": teacher}, ids, 1).sum()

        return jax.jit(jax.grad(total)).lower(heads).compile().cost_analysis()["flops"]

    # Of six products with a table four are left, those with the narrower one among them.
    products = 2 * ROWS * LENGTH * 128 * 2 * TEACHER.n_embd
    saved = flops(lambda x: x) - flops(jax.lax.stop_gradient)
    assert saved > 0.9 * products
