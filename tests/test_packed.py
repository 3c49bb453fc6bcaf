"""Packed weights: the same model in a quarter of the bytes, on any mesh, as a frozen base."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e2e.test_run import train_args
from flax import nnx
from test_initial import INFO
from test_initial import same as assert_same
from test_parallel import sizes
from test_seams import one_step, program_on, rows_of
from test_training import assert_close

from l1_jax.checkpoint.manifest import find_damage, read_info
from l1_jax.checkpoint.restore import read_shapes
from l1_jax.checkpoint.write import write
from l1_jax.compression.pack import choose_packing, pack_checkpoint
from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.yaml_file import load_config
from l1_jax.errors import UserError
from l1_jax.inference.generate import Generator, choose_generation
from l1_jax.loading import load_model
from l1_jax.model.flops import count_parameters
from l1_jax.model.packed import find_packing, is_packed, pack_int8, pack_params, take_rows, unpack
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build, summed_dims
from l1_jax.objectives.cross_entropy import loss_sum
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.sharding import named, parameter_shardings
from l1_jax.planner.state_size import local_bytes, state_bytes
from l1_jax.training.initial import read_packing, restore_state
from l1_jax.training.state import PARAMS, to_trees

MODEL = ModelConfig(vocab_size=64, max_seq_length=16, n_layers=4, n_heads=2, n_embd=32, dropout=0.0)
UNTIED = dataclasses.replace(MODEL, tie_embeddings=False, n_kv_heads=1, activation="swiglu")
ALL_PACKED = "transfer.freeze=['kernel', 'token_embedding']"


def unpacked(params):
    """The model whose weights are the numbers that packed ones stand for."""

    def read(weight):
        return unpack(weight, jnp.float32) if is_packed(weight) else weight

    return jax.tree.map(read, params, is_leaf=is_packed)


def noisy(params, stddev):
    def add(leaf):
        return leaf + stddev * jax.random.normal(jax.random.key(leaf.size), leaf.shape)

    return jax.tree.map(add, params)


def test_int8_is_the_nearest():
    shape = (3, 5, 2, 7)
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight[:, :, 0, 0] *= 1e6
    weight[1, :, 1, 3] = 0
    packed = pack_int8(weight, (1,))
    assert packed.values.dtype == jnp.int8
    assert packed.scales.dtype == jnp.float32
    assert packed.scales.shape == (3, 1, 2, 7)
    assert packed.shape == shape
    assert packed.size == weight.size

    assert_close(packed.scales[:, 0], np.abs(weight).max(axis=1) / 127, rtol=1e-6)
    off = np.abs(unpack(packed, jnp.float32) - weight)
    assert (off <= packed.scales * (0.5 + 1e-4)).all()
    assert (np.abs(packed.values).max(axis=1) == 127).sum() == 3 * 2 * 7 - 1
    assert not unpack(packed, jnp.float32)[1, :, 1, 3].any()

    over_two = pack_int8(weight, (1, 2))
    assert over_two.scales.shape == (3, 1, 1, 7)
    assert unpack(over_two, jnp.bfloat16).dtype == jnp.bfloat16


def test_rows_of_a_packed_table_are_those_of_the_unpacked():
    table = pack_int8(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), (1,))
    rows = np.array([[3, 0, 8], [1, 1, 2]])
    np.testing.assert_array_equal(take_rows(table, rows), unpack(table, jnp.float32)[rows])


def test_only_weights_of_products_are_packed():
    packing = choose_packing(UNTIED, "int8")
    kernels = ("attention.q", "attention.kv", "attention.out", "mlp.up", "mlp.down")
    expected = {f"blocks.{name}.kernel" for name in kernels} | {"token_embedding", "head"}
    assert set(packing) == expected
    assert choose_packing(UNTIED, "int8", lambda path: "mlp" in path) == dict.fromkeys(
        ("blocks.mlp.up.kernel", "blocks.mlp.down.kernel"), "int8"
    )

    # A scale for each output, of each layer; a table has one for each row.
    _, initialise, _ = build(UNTIED, packing=packing)
    params = jax.eval_shape(initialise, jax.random.key(0))
    blocks = params["blocks"]
    assert blocks["attention"]["kv"]["kernel"].scales.shape == (4, 1, 2, 1, 16)
    assert blocks["attention"]["out"]["kernel"].scales.shape == (4, 1, 1, 32)
    assert blocks["mlp"]["up"]["kernel"].scales.shape == (4, 1, 2, 128)
    assert params["head"].scales.shape == (128, 1)

    # Parameters are what the model has, and not how they are stored.
    plain = jax.eval_shape(build(UNTIED)[1], jax.random.key(0))
    assert count_parameters(UNTIED, params) == count_parameters(UNTIED, plain)


@functools.cache
def outcome(model, mesh_text, is_plain=False, dtype="float32"):
    """Logits, loss and the loss's gradient by what enters the blocks."""
    parallelism = sizes(mesh_text)
    count = np.prod([int(size) for size in re.findall(r"\d+", mesh_text)])
    mesh = create_mesh(parallelism, jax.devices()[:count])

    packing = choose_packing(model, "int8")
    graphdef, _, axes = build(model, jnp.dtype(dtype), packing=packing)
    plain = noisy(build(model)[1](jax.random.key(0)), 0.05)
    params = pack_params(plain, summed_dims(model), packing)
    if is_plain:
        params, axes = unpacked(params), build(model)[2]

    rows = rows_of()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, parameter_shardings(mesh, axes))
        placed = {
            name: jax.device_put(value, named(mesh, "batch", "length"))
            for name, value in rows.items()
            if name != "row_hash"
        }

        def compute(params, batch):
            network = nnx.merge(graphdef, params)
            hidden = network(batch["tokens"]).hidden
            loss = loss_sum(network, hidden, batch["targets"], batch["weights"], num_chunks=2)
            return loss.nll, network.logits(hidden)

        def by_norm(norm, params, batch):
            return compute(params | {"blocks": params["blocks"] | {"mlp_norm": norm}}, batch)

        gradient = jax.value_and_grad(by_norm, has_aux=True)
        result = jax.jit(gradient)(params["blocks"]["mlp_norm"], params, placed)
        return jax.device_get(result), params


@pytest.mark.parametrize("model", [MODEL, UNTIED])
def test_a_packed_model_is_that_of_its_numbers(model):
    """In loss, logits, and gradient by what is not packed."""
    packed, _ = outcome(model, "data=1")
    plain, _ = outcome(model, "data=1", is_plain=True)
    assert np.abs(plain[0][1][..., :64]).max() > 0.5
    assert_close(packed, plain, rtol=1e-5, atol=1e-4)


def test_a_loop_over_the_layers_reads_them_as_a_scan_does():
    packed, _ = outcome(dataclasses.replace(MODEL, scan_layers=False), "data=1")
    assert_close(packed, outcome(MODEL, "data=1")[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("mesh_text", ["data=2 fsdp=2", "tensor=2"])
def test_a_packed_model_on_a_mesh(mesh_text):
    one, _ = outcome(MODEL, "data=1")
    several, params = outcome(MODEL, mesh_text)
    assert_close(several, one, rtol=1e-5, atol=1e-4)

    # Values lie as the weight would, and scales with the outputs that they are of.
    _, plain = outcome(MODEL, mesh_text, is_plain=True)
    for name in ("up", "down"):
        kernel = params["blocks"]["mlp"][name]["kernel"]
        where = plain["blocks"]["mlp"][name]["kernel"].sharding
        assert kernel.values.sharding == where
        shard = kernel.values.sharding.shard_shape(kernel.shape)
        scales = kernel.scales.sharding.shard_shape(kernel.scales.shape)
        assert scales == (shard[0], 1, shard[2])
        assert np.prod(shard) == kernel.size // 2

    table = params["token_embedding"]
    assert table.values.sharding == plain["token_embedding"].sharding


@pytest.fixture(scope="module")
def packed(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "int8"
    pack_checkpoint(trained, path)
    return path


def file_bytes(checkpoint, name):
    directory = checkpoint / "state" / "params" / name
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_a_packed_checkpoint_is_a_checkpoint(script, packed, trained, corpus):
    source = trained / "best_model"
    assert find_damage(packed) is None
    assert script("verify", packed).code == 0

    # What it says of itself: of the same step, and nothing of a loss that was another model's.
    info = read_info(packed)
    assert (info.step, info.tokens) == (read_info(source).step, read_info(source).tokens)
    assert info.best_loss is None

    # A quarter of the bytes, in memory and on disk, and the scales.
    shapes = read_shapes(packed, PARAMS)
    assert shapes["blocks.mlp.up.kernel.values"] == "int8[2, 32, 128]"
    assert shapes["blocks.mlp.up.kernel.scales"] == "float32[2, 1, 128]"
    assert shapes["token_embedding.scales"] == "float32[384, 1]"
    assert shapes["blocks.mlp.up.bias"] == "float32[2, 128]"
    assert not any("zeros" in name for name in shapes)
    for path in read_packing(packed):
        small = file_bytes(packed, f"{path}.values")
        assert small < 0.27 * file_bytes(source, path)

    model = load_model(packed, jax.devices()[:1])
    whole = load_model(source, jax.devices()[:1])
    kernel = model.params["blocks"]["mlp"]["up"]["kernel"]
    assert (kernel.values.nbytes, kernel.scales.nbytes) == (2 * 32 * 128, 4 * 2 * 128)
    assert local_bytes(model.params) < 0.35 * local_bytes(whole.params)

    original = whole.params["blocks"]["mlp"]["up"]["kernel"]
    assert (abs(unpack(kernel, jnp.float32) - original) <= 0.501 * kernel.scales).all()

    # Its loss is nearly that of the original.
    losses = []
    for path in (packed, source):
        result = script("evaluate", "--model", path, "--data", corpus, "--json")
        assert result.code == 0, result.err
        losses.append(json.loads(result.out)["loss"])
    assert abs(losses[0] / losses[1] - 1) < 0.005


def test_text_of_a_packed_model(script, packed, trained):
    """The greedy text of the numbers that it stands for."""
    model = load_model(packed, jax.devices()[:1])
    how = choose_generation(model, {"temperature": 0.0})
    prompts = ["The value of", "An object"]

    def texts(params):
        generator = Generator(dataclasses.replace(model, params=params))
        return [one.text for one in generator(prompts, how, max_tokens=16)]

    text = texts(model.params)[0]
    flags = ("--temperature", 0, "--max-tokens", 16)
    result = script("generate", "--model", packed, "--prompt", prompts[0], *flags)
    assert result.code == 0
    assert text in result.out

    # Of weights that are large enough for each to count.
    shape = model.config.model
    loud = noisy(load_model(trained, jax.devices()[:1]).params, 0.5)
    params = pack_params(loud, summed_dims(shape), read_packing(packed))
    assert texts(params) == texts(unpacked(params))


def test_what_cannot_be_packed_or_read_is_said(packed, trained, tmp_path):
    with pytest.raises(UserError, match="is packed already"):
        pack_checkpoint(packed, tmp_path / "twice")
    with pytest.raises(UserError, match="is in the way of a checkpoint"):
        pack_checkpoint(trained, packed)
    with pytest.raises(UserError, match=r"weight a\.kernel are int3\. Use .* they are int8"):
        find_packing({"a.kernel.values": "int3[4]", "a.kernel.scales": "float32[4]"})
    with pytest.raises(UserError, match=r"weight a\.kernel are missing"):
        find_packing({"a.kernel.scales": "float32[4]"})

    model = load_model(packed, jax.devices()[:1])
    table = dataclasses.replace(model.params["token_embedding"], scales=None)
    texts = {name: (packed / name).read_text() for name in ("config.yaml", "tokenizer.json")}
    less = {PARAMS: model.params | {"token_embedding": table}}
    write(tmp_path / "less", less, texts, INFO)
    with pytest.raises(UserError, match=r"token_embedding\.scales is missing there and float32\["):
        load_model(tmp_path / "less", jax.devices()[:1])


@pytest.mark.parametrize("mesh_text", ["data=1", "data=2 fsdp=2"])
def test_a_packed_base_has_no_gradient(mesh_text, tmp_path):
    packing = choose_packing(MODEL, "int8")

    def step(*overrides, packing):
        # What recomputes would hide what is kept.
        keys = (*overrides, "training.gradient_checkpointing=none")
        with program_on(mesh_text, *keys, packing=packing) as (mesh, program):
            state = program.create()
            before = jax.device_get(state.held)
            assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
                lambda x: x.sharding, program.abstract
            )
            arguments = local_bytes(state)
            state, metrics, compiled = one_step(mesh, program, state)
            assert_same(jax.device_get(state.held), before)
            if packing:
                write(tmp_path / "saved", to_trees(state), {"config.yaml": "x"}, INFO)
                assert_same(restore_state(tmp_path / "saved", program.abstract), state)
        return state, metrics, compiled, arguments

    state, metrics, compiled, arguments = step(ALL_PACKED, packing=packing)
    _, float_metrics, frozen, float_arguments = step(ALL_PACKED, packing={})
    _, _, whole, _ = step(packing={})

    assert is_packed(state.held["blocks"]["mlp"]["up"]["kernel"])
    trained = jax.tree.leaves(state.params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) == 1 + 2 * sum(
        leaf.size for leaf in trained
    )
    assert np.isfinite(metrics["loss"])
    assert_close(metrics["loss"], float_metrics["loss"], rtol=1e-2)

    # Four kernels and the table: of none is a product left that makes a gradient.
    def products(compiled):
        return len(re.findall(r" dot\(", compiled.as_text()))

    assert products(compiled) == products(frozen) == products(whole) - 5

    # The state takes a quarter for what is packed, and the backward pass keeps no numbers of it:
    # what it needs more than a frozen float32 model is a layer's and the table's.
    numbers = sum(
        weight.size
        for weight in jax.tree.leaves(state.held, is_leaf=is_packed)
        if is_packed(weight)
    )
    share = 2 if "fsdp" in mesh_text else 1
    assert float_arguments - arguments > 2.8 * numbers / share
    temporaries = [one.memory_analysis().temp_size_in_bytes for one in (compiled, frozen, whole)]
    largest_layer = 2 * 32 * 128
    assert temporaries[0] < temporaries[1] + 4 * (largest_layer + 128 * 32)
    assert temporaries[0] < temporaries[2]


def test_a_packed_base_in_a_pipeline():
    """Its stages share the layers of values and of scales."""
    losses = []
    for mesh_text in ("data=1", "pipeline=2"):
        packing = choose_packing(MODEL, "int8")
        with program_on(mesh_text, ALL_PACKED, packing=packing) as (mesh, program):
            state, metrics, _ = one_step(mesh, program, program.create())
            losses.append(jax.device_get(metrics["loss"]))

    scales = state.held["blocks"]["mlp"]["up"]["kernel"].scales
    assert scales.sharding.shard_shape(scales.shape) == (2, 1, 128)
    assert_close(losses[0], losses[1], rtol=1e-4)


BASE = ("transfer.freeze=[kernel,token_embedding]", "training.save_steps=2")


def test_a_run_on_a_packed_base(script, packed, tiny_config, prepared, tmp_path):
    """Its checkpoints are packed again, and it goes on bit for bit."""
    run = tmp_path / "run"
    keys = (*BASE, f"transfer.from={packed}", "training.max_steps=4", "training.learning_rate=0.1")
    args = train_args(tiny_config, prepared, run, *keys)
    result = script("train", *args)
    assert result.code == 0, result.err

    def arrays():
        directory = run / "checkpoint-4" / "state"
        files = [path for path in directory.rglob("*") if path.parent.parent.parent == directory]
        return {path.relative_to(directory): path.read_bytes() for path in files if path.is_file()}

    base = read_packing(packed)
    assert read_packing(run / "checkpoint-4") == base
    params = [load_model(path, jax.devices()[:1]).params for path in (packed, run / "checkpoint-4")]
    before, after = (dict(jax.tree.leaves_with_path(tree, is_leaf=is_packed)) for tree in params)
    for path, leaf in after.items():
        if is_packed(leaf):
            assert_same(leaf, before[path])
        else:
            assert (leaf != before[path]).any(), path

    whole = arrays()
    assert len(whole) > 40
    for name in ("checkpoint-4", "best_model"):
        shutil.rmtree(run / name, ignore_errors=True)
    resumed = script("train", *args, "--resume")
    assert resumed.code == 0, resumed.err
    assert "going on from" in resumed.err
    assert arrays() == whole


def test_a_packed_weight_is_not_trained(script, packed, tiny_config, prepared, tmp_path):
    def error(*keys, flags=()):
        args = train_args(tiny_config, prepared, tmp_path / "run", *keys, "training.max_steps=2")
        result = script("train", *args, *flags)
        assert result.code == 2
        assert not (tmp_path / "run").exists()
        return result.error

    begin = f"transfer.from={packed}"
    assert "leaves packed weights to be trained, such as blocks.0.attention.out" in error(begin)
    some = r"transfer.freeze=['blocks\.0\.', embedding]"
    assert "transfer.freeze leaves" in error(begin, some)
    assert "such as blocks.1.attention.out.kernel" in error(begin, some)

    # It has weights alone.
    flags = ("--resume", packed)
    assert "has no optimizer, so that no run can go on from it" in error(flags=flags)
    frozen = error(BASE[0], flags=(*flags, "--allow-change", "transfer.freeze"))
    assert "transfer.from" in frozen


def test_a_plan_knows_what_is_packed(packed, trained, tiny_config):
    found = []
    for source in (packed, trained):
        overrides = (BASE[0], f"transfer.from={source}")
        config = load_config(tiny_config, overrides)
        mesh = create_mesh(sizes("data=1"), jax.devices()[:1])
        resolved = resolve(
            config.replace("training", max_steps=5),
            Facts(300, rows_of_stream(10**5), dict(mesh.shape), "cpu"),
        )
        found.append((state_bytes(resolved, mesh), load_model(source, jax.devices()[:1]).params))

    (small, params), (large, _) = found
    assert small.params == local_bytes(params)
    assert small.unpacked == large.params == large.unpacked
    assert small.num_parameters == large.num_parameters
    assert small.trained == large.trained
    assert small.state - small.params == large.state - large.params
