"""The switches of docs/recipe.md against transformers, hand calculations, and their own other paths."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from faults.numerics import arrays
from flax import nnx
from test_model import logits, make
from test_parallel import DIMS, ROWS, batch, sizes
from test_training import TRAINING, assert_close

from l1_jax.config.resolve import check_decay
from l1_jax.config.schema import Config
from l1_jax.errors import UserError
from l1_jax.model.attention import empty_cache
from l1_jax.model.context import Context
from l1_jax.model.layers import MLP
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.cross_entropy import loss_sum
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import put_batch
from l1_jax.parallel.section import MESH_AXES
from l1_jax.training.matrices import muon_flops
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.program import make_program
from l1_jax.training.schedule import learning_rate_schedule

MODERN = ModelConfig(
    vocab_size=100, max_seq_length=16, n_layers=4, n_heads=4, n_kv_heads=2, n_embd=32, dropout=0.1,
    position_embedding="rope", norm="rmsnorm", qk_norm=True, activation="relu_squared", bias=False,
    tie_embeddings=False, logit_softcap=1.0, zero_init_projections=True,
)  # fmt: skip
STILL = dataclasses.replace(MODERN, dropout=0.0)
TOKENS = np.random.default_rng(0).integers(0, 100, (2, 16)).astype(np.int32)


def shaken(params):
    """Parameters of which none is 0 or 1."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_equals_transformers(name):
    """Rotary positions, RMSNorm, SwiGLU, grouped heads, no biases; Llama a head of its own, Qwen3 QK-norm."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(
        STILL, activation="swiglu", logit_softcap=None, n_inner=48, rope_theta=500.0, qk_norm=name == "Qwen3",
        tie_embeddings=name == "Qwen3", layer_norm_epsilon=1e-3,
    )  # fmt: skip
    shape = getattr(transformers, f"{name}Config")(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=16, rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, tie_word_embeddings=name == "Qwen3",
    )  # fmt: skip
    theirs = getattr(transformers, f"{name}ForCausalLM")(shape).eval()
    graphdef, params = make(config)
    params = shaken(params)
    weights = {
        "model.embed_tokens": params["token_embedding"][:100].T,
        "model.norm": params["final_norm"]["scale"],
    }
    weights["lm_head"] = params["token_embedding" if config.tie_embeddings else "head"][:100].T
    for i in range(4):
        block = jax.tree.map(lambda p, i=i: p[i], params["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        names = {
            "input_layernorm": block["attention_norm"]["scale"], "post_attention_layernorm": block["mlp_norm"]["scale"],
            "self_attn.q_proj": attention["q"]["kernel"].reshape(32, 32),
            "self_attn.k_proj": attention["kv"]["kernel"][:, 0].reshape(32, 16),
            "self_attn.v_proj": attention["kv"]["kernel"][:, 1].reshape(32, 16),
            "self_attn.o_proj": attention["out"]["kernel"].reshape(32, 32),
            "mlp.gate_proj": mlp["up"]["kernel"][:, 0], "mlp.up_proj": mlp["up"]["kernel"][:, 1],
            "mlp.down_proj": mlp["down"]["kernel"],
        }  # fmt: skip
        if config.qk_norm:
            names |= {f"self_attn.{x}_norm": attention[f"{x}_norm"]["scale"] for x in "qk"}
        weights |= {f"model.layers.{i}.{name}": value for name, value in names.items()}
    state = theirs.state_dict()
    assert {f"{name}.weight" for name in weights} == set(state)
    theirs.load_state_dict(
        {f"{name}.weight": torch.from_numpy(np.array(value).T) for name, value in weights.items()}
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS).long()).logits.numpy()
    np.testing.assert_allclose(logits(graphdef, params, TOKENS)[..., :100], expected, atol=2e-4)


def test_relu_squared_by_hand():
    mlp = MLP(
        nnx.Rngs(params=0),
        dataclasses.replace(STILL, zero_init_projections=False, initializer_range=1.0),
    )
    x = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    expected = np.maximum(x @ mlp.up.kernel[...], 0) ** 2 @ mlp.down.kernel[...]
    np.testing.assert_allclose(mlp(x, Context())[0], expected, rtol=1e-4, atol=1e-4)


def test_what_starts_at_zero():
    graphdef, params = make(STILL)
    assert not logits(graphdef, params, TOKENS)[..., :100].any()
    model = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(
        model(TOKENS)[0], model.final_norm(params["token_embedding"][TOKENS])
    )


def test_softcapped_logits():
    params = shaken(make(STILL)[1])
    plain = logits(make(dataclasses.replace(STILL, logit_softcap=None))[0], params, TOKENS)[
        ..., :100
    ]
    capped = logits(make(STILL)[0], params, TOKENS)
    assert np.abs(plain).max() > 1
    np.testing.assert_allclose(capped[..., :100], np.tanh(plain), atol=1e-5)
    assert jax.nn.softmax(capped)[..., 100:].max() == 0


@pytest.mark.parametrize("num_chunks", [1, 4, 3, 7])  # of 16 positions
def test_the_loss_has_the_gradient_of_the_plain_one(num_chunks):
    """Softcap and a head of its own; weights that differ, some 0."""
    graphdef, params = make(STILL)
    params, rng = shaken(params), np.random.default_rng(2)
    targets, weights = (
        rng.integers(0, 100, (2, 16)),
        (rng.random((2, 16)) * (rng.random((2, 16)) < 0.7)).astype("f4"),
    )

    def fused(params):
        model = nnx.merge(graphdef, params)
        return 3 * loss_sum(model, model(TOKENS).hidden, targets, weights, num_chunks).nll

    def plain(params):
        nll = -jax.nn.log_softmax(logits(graphdef, params, TOKENS))
        return 3 * (weights * jnp.take_along_axis(nll, targets[..., None], -1)[..., 0]).sum()

    assert_close(*(jax.value_and_grad(f)(params) for f in (fused, plain)), rtol=1e-3, atol=1e-4)


def test_cached_logits_and_the_loop_are_the_full_forward():
    graphdef, params = make(STILL)
    params = shaken(params)
    expected = logits(graphdef, params, TOKENS)
    looped = make(dataclasses.replace(STILL, scan_layers=False), "full")[0]
    np.testing.assert_allclose(logits(looped, params, TOKENS), expected, rtol=1e-4, atol=1e-5)
    model, positions = nnx.merge(graphdef, params), np.broadcast_to(np.arange(16), (2, 16))
    cache = empty_cache(STILL, 2, 16, jnp.float32)
    assert [keys.shape for keys, _ in cache] == [(2, 2, 16, 8)] * 4  # as many heads as keys have
    x, cache, _, _ = model(TOKENS[:, :10], positions[:, :10], cache=cache)
    np.testing.assert_allclose(model.logits(x), expected[:, :10], rtol=1e-4, atol=1e-5)
    for at in range(10, 16):
        x, cache, _, _ = model(TOKENS[:, at : at + 1], positions[:, at : at + 1], cache=cache)
        np.testing.assert_allclose(model.logits(x), expected[:, at : at + 1], rtol=1e-4, atol=1e-5)


def orthogonalised(matrix):
    """Jordan et al.'s quintic Newton-Schulz iteration."""
    x = matrix.astype(np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_by_hand():
    """Each layer's q, k and v by itself; two steps of Nesterov momentum; the rest of the model is AdamW's."""
    training = dataclasses.replace(
        TRAINING, optimizer="muon", muon_learning_rate=0.05, max_grad_norm=None
    )
    _, initialise, axes = build(dataclasses.replace(STILL, n_kv_heads=None, activation="swiglu"))
    params = shaken(initialise(jax.random.key(0)))
    optimizer, adamw = (
        create_optimizer(dataclasses.replace(training, optimizer=o), axes)
        for o in ("muon", "adamw")
    )
    state, adamw_state = optimizer.init(params), adamw.init(params)
    rng = np.random.default_rng(3)
    first, second = (
        jax.tree.map(lambda p: rng.standard_normal(p.shape).astype("f4"), params) for _ in range(2)
    )
    for grads in (first, second):
        updates, state = optimizer.update(grads, state, params)
        expected, adamw_state = adamw.update(grads, adamw_state, params)

    def kernel(tree, at):
        return np.asarray(tree["blocks"][at[0]][at[1]]["kernel"])

    for at, shape, scale in (
        (("attention", "qkv"), lambda m: m.transpose(0, 2, 1, 3, 4).reshape(12, 32, 32), 1),
        (("attention", "out"), lambda m: m.reshape(4, 32, 32), 1),
        (("mlp", "up"), lambda m: m.transpose(0, 2, 1, 3).reshape(8, 32, -1), np.sqrt(128 / 32)),
        (("mlp", "down"), lambda m: m.reshape(4, -1, 32), 1),
    ):
        one, two, weights, got = (
            shape(kernel(tree, at)) for tree in (first, second, params, updates)
        )
        nesterov = 0.95 * (0.95 * one + two) + two
        for g, w, update in zip(nesterov, weights, got, strict=True):
            wide = g.T if g.shape[0] > g.shape[1] else g
            expected_update = orthogonalised(wide).T if wide is not g else orthogonalised(g)
            singular = np.linalg.svd(expected_update, compute_uv=False)
            assert np.quantile(singular, 0.1) > 0.5
            assert singular.max() < 1.3
            by_hand = (scale * expected_update + 0.1 * w) * (0.05 / 0.01)
            np.testing.assert_allclose(update, by_hand, atol=2e-3)
    for name in ("token_embedding", "head", "final_norm"):
        assert_close(updates[name], expected[name], rtol=1e-5)
    # 12 + 4 square matrices of 32 and 12 of 32 x 128, with 5 iterations
    assert muon_flops(params, axes) == 5 * (16 * 6 * 32**3 + 12 * (4 * 32**2 * 128 + 2 * 32**3))


def test_lion_by_hand():
    config = dataclasses.replace(
        TRAINING,
        optimizer="lion",
        beta2=0.99,
        max_grad_norm=None,
        moment_dtype="bfloat16",
        weight_decay=0.1,
    )
    optimizer, params = (
        create_optimizer(config),
        {name: jnp.full(2, 0.5, "f4") for name in ("kernel", "bias")},
    )
    state, momentum = optimizer.init(params), 0.0
    for g in (np.float32(0.3), np.float32(-0.02)):
        updates, state = optimizer.update(
            jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params), state, params
        )
        sign = np.sign(0.9 * momentum + 0.1 * g)
        np.testing.assert_allclose(updates["kernel"], sign + 0.1 * 0.5, rtol=1e-6)
        np.testing.assert_allclose(updates["bias"], sign, rtol=1e-6)
        momentum = 0.99 * momentum + 0.01 * g
        np.testing.assert_allclose(state[1].mu["bias"].astype(jnp.float32), momentum, rtol=2**-8)
    assert state[1].mu["bias"].dtype == jnp.bfloat16


def test_adafactor_is_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = dataclasses.replace(
        TRAINING, optimizer="adafactor", max_grad_norm=None, weight_decay=0.0
    )
    axes = {
        "kernel": ("layers", "embed", "qkv", "heads", "head"),
        "bias": ("layers", "qkv", "heads", "head"),
    }
    params, rng = (
        {"kernel": jnp.ones((2, 6, 3, 2, 4)), "bias": jnp.ones((2, 3, 2, 4))},
        np.random.default_rng(0),
    )
    optimizer = create_optimizer(config, axes)
    state = optimizer.init(params)
    assert state[1].rows["kernel"].shape == (2, 6, 3, 1, 1)
    assert state[1].columns["kernel"].shape == (2, 1, 3, 2, 4)

    def parts(tree):
        """A matrix and a vector for each layer and each of q, k and v."""
        kernel, bias = np.asarray(tree["kernel"]), np.asarray(tree["bias"])
        return [
            x
            for i in range(2)
            for j in range(3)
            for x in (kernel[i, :, j].reshape(6, 8), bias[i, j].reshape(8))
        ]

    theirs = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in parts(params)]
    torch_optimizer = transformers.Adafactor(
        theirs, lr=1.0, scale_parameter=False, relative_step=False
    )
    for scale in (1.0, 3.0, 0.2):
        grads = jax.tree.map(
            lambda p, s=scale: (s * rng.standard_normal(p.shape)).astype("f4"), params
        )
        before = [p.detach().clone() for p in theirs]
        for parameter, grad in zip(theirs, parts(grads), strict=True):
            parameter.grad = torch.from_numpy(grad.copy())
        torch_optimizer.step()
        updates, state = optimizer.update(grads, state, params)
        for update, old, new in zip(parts(updates), before, theirs, strict=True):
            np.testing.assert_allclose(update, (old - new).detach(), atol=1e-5)


def test_wsd_by_hand():
    config = dataclasses.replace(
        TRAINING, schedule="wsd", decay_fraction=0.25
    )  # 20 steps, 4 of warm-up, 5 of decay
    rate = learning_rate_schedule(config)
    steps = (1, 2, 4, 5, 15, 16, 18, 20, 99)
    expected = (0.0025, 0.005, 0.01, 0.01, 0.01, 0.0082, 0.0046, 0.001, 0.001)
    np.testing.assert_allclose([rate(s) for s in steps], expected, rtol=1e-5)
    check_decay(dataclasses.replace(config, decay_fraction=0.8))
    with pytest.raises(
        UserError, match=r"warmup_steps 4 and the 17 steps in which wsd decays are more than the 20"
    ):
        check_decay(dataclasses.replace(config, decay_fraction=0.85))


def run_step(mesh, model, training):
    """The state after a step from shaken parameters, on the host, and the metrics."""
    parallelism = sizes(mesh)
    devices = jax.devices()[: int(np.prod([getattr(parallelism, axis) for axis in MESH_AXES]))]
    mesh = create_mesh(parallelism, devices)
    training = dataclasses.replace(
        training, batch_size=ROWS // (mesh.shape["data"] * mesh.shape["fsdp"])
    )
    with jax.set_mesh(mesh):
        program = make_program(Config(model=model, training=training), mesh)
        first = program.create()
        first = dataclasses.replace(first, params=shaken(jax.device_get(first.params)))
        first = jax.device_put(first, jax.tree.map(lambda leaf: leaf.sharding, program.abstract))
        return jax.device_get(
            program.train_step(
                first,
                {},
                put_batch(batch(), DIMS, rows=range(ROWS), mesh=mesh, global_batch_size=ROWS),
            )
        )


@pytest.mark.parametrize(
    ("optimizer", "activation", "meshes"),
    [
        ("muon", "relu_squared", ("fsdp=4 tensor=2", "pipeline=2 context=2 tensor=2")),
        ("adafactor", "swiglu", ("fsdp=2 context=2 tensor=2",)),
    ],
)
def test_any_mesh_is_one_device(optimizer, activation, meshes):
    """Documents apart, so positions differ from row to row; what the optimizer keeps, to 1e-4 of its largest. Six
    layers, which Muon's devices do not divide."""
    model = dataclasses.replace(MODERN, activation=activation, n_layers=6)
    training = dataclasses.replace(TRAINING, optimizer=optimizer, precision="float32")
    expected, expected_metrics = run_step("data=1", model, training)
    for mesh in meshes:
        after, metrics = run_step(mesh, model, training)
        assert_close(metrics, expected_metrics, rtol=1e-5)
        assert_close(after.params, expected.params, atol=2e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()),
            after.opt_state,
            expected.opt_state,
        )


def test_what_optimizers_keep_lies_in_shards():
    def abstract(optimizer):
        training = dataclasses.replace(
            TRAINING, optimizer=optimizer, precision="float32", batch_size=8
        )
        mesh = create_mesh(sizes("fsdp=4 tensor=2"), jax.devices())
        return make_program(Config(model=MODERN, training=training), mesh).abstract.opt_state[1]

    def share(leaf):
        return np.prod(leaf.sharding.shard_shape(leaf.shape)) / leaf.size

    moments = abstract("muon").inner_states["muon"].inner_state[0][0].trace["blocks"]
    assert {share(leaf) for leaf in jax.tree.leaves(moments)} == {1 / 8}
    factored = abstract("adafactor")
    assert share(factored.rows["blocks"]["attention"]["kv"]["kernel"]) == 1 / 4  # the width
    assert share(factored.columns["blocks"]["attention"]["kv"]["kernel"]) == 1 / 2  # the heads


def test_a_run_with_every_switch(script, prepared, tmp_path):
    """Trains, resumes to the same bits, and generates."""
    training = {
        "optimizer": "muon",
        "schedule": "wsd",
        "moment_dtype": "bfloat16",
        "schedule_steps": 6,
    }
    training |= {"eval_steps": 50, "eval_batches": 2, "batch_size": 1, "global_batch_size": 8}
    model = {key.name: getattr(MODERN, key.name) for key in dataclasses.fields(MODERN)}
    config = {
        "model": model | {"vocab_size": 300},
        "data": {"path": str(prepared)},
        "training": training,
    }
    (tmp_path / "modern.yaml").write_text(yaml.safe_dump(config))

    def train(name, steps, *flags):
        keys = (f"training.output_dir={tmp_path / name}", f"training.max_steps={steps}")
        result = script("train", "--config", tmp_path / "modern.yaml", *keys, *flags)
        assert result.code == 0, result.err

    train("whole", 6)
    train("parts", 3)
    train("parts", 6, "--resume")
    whole, parts = (arrays(tmp_path / name / "checkpoint-6") for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    made = script(
        "generate",
        "--model",
        tmp_path / "parts",
        "--prompt",
        "The",
        "--max-tokens",
        5,
        "--greedy",
        "--json",
    )
    assert json.loads(made.out)["completions"][0]["tokens"] == 5
