"""Any mesh of eight devices gives the loss, the gradients and the first state of one device."""

import dataclasses
import functools
import itertools
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from jax._src.clusters.slurm_cluster import SlurmCluster
from test_training import DIMS as TOKEN_DIMS
from test_training import TRAINING, assert_close

from l1_jax.checkpoint.manifest import CheckpointInfo
from l1_jax.checkpoint.saver import Saver
from l1_jax.commands.flags import parse_mesh
from l1_jax.config.resolve import choose_microbatches
from l1_jax.config.schema import Config
from l1_jax.data.sources import make_batch
from l1_jax.devices.processes import slurm_address
from l1_jax.devices.select import select_devices
from l1_jax.errors import UserError
from l1_jax.model.section import ModelConfig
from l1_jax.model.transformer import build
from l1_jax.objectives.next_token import NextToken
from l1_jax.parallel.layout import Layout, check_divisible, zigzag
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.pipeline import run_stages
from l1_jax.parallel.placement import process_rows, put_batch
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.parallel.sharding import named
from l1_jax.training.initial import restore_state
from l1_jax.training.optimizer import create_optimizer
from l1_jax.training.state import create_state, place_state, to_trees
from l1_jax.training.step import make_train_step

# The parity table of docs/scaling.md.
PARITY = [
    "data=8", "fsdp=8", "tensor=8", "context=8", "pipeline=4 data=2",
    "data=4 fsdp=2", "data=2 fsdp=2 tensor=2", "fsdp=4 tensor=2", "tensor=4 data=2",
    "context=2 fsdp=4", "context=2 fsdp=2 tensor=2", "context=4 tensor=2",
    "pipeline=2 fsdp=4", "pipeline=2 tensor=2 data=2", "pipeline=2 context=2 fsdp=2", "pipeline=2 context=2 tensor=2",
]  # fmt: skip
MODEL = ModelConfig(
    vocab_size=100, max_seq_length=16, n_layers=4, n_heads=8, n_embd=16, dropout=0.1
)
ROWS = 32


def sizes(text):
    """`"fsdp=4 tensor=2"` -> ParallelismConfig"""
    return ParallelismConfig(
        **({"data": 1} | {k: int(v) for k, v in (part.split("=") for part in text.split())})
    )


def batch():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 100, (ROWS, 17)).astype(np.int32)
    weights = (rng.random((ROWS, 16)) < 0.6).astype(np.float32)
    return make_batch(tokens, eot_id=7) | {
        "weights": weights,
        "row_hash": np.arange(ROWS, dtype=np.uint32),
        "stop": np.zeros(ROWS, bool),
    }


# Those of `batch`: here each row says whether it stops.
DIMS = TOKEN_DIMS | {"stop": ("batch",)}
OPTIMIZER = create_optimizer(TRAINING)
NEXT_TOKEN = NextToken()


@functools.cache
def initial(text):
    """A mesh, the placement of the state on it, and the first state, on the host."""
    parallelism = sizes(text)
    devices = int(np.prod([getattr(parallelism, axis) for axis in MESH_AXES]))
    mesh = create_mesh(parallelism, jax.devices()[:devices])
    _, initialise, axes = build(MODEL)
    create = functools.partial(create_state, initialise, OPTIMIZER, seed=0, is_float16=False)
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, place_state(jax.eval_shape(create), axes, mesh)
    )
    with jax.set_mesh(mesh):
        return mesh, shardings, jax.device_get(jax.jit(create, out_shardings=shardings)())


@functools.cache
def run_step(text, accumulation, dropout, attention="plain", objective=NEXT_TOKEN):
    """The state after one step on a mesh, and the metrics, on the host."""
    mesh, shardings, first = initial(text)
    model = dataclasses.replace(MODEL, dropout=dropout)
    training = dataclasses.replace(TRAINING, gradient_accumulation_steps=accumulation)
    layout = Layout.of(mesh, ROWS // accumulation // Layout.of(mesh).rows)
    with jax.set_mesh(mesh):
        graphdef = build(model, layout=layout, attention=attention)[0]
        step = make_train_step(
            graphdef, OPTIMIZER, Config(model=model, training=training), objective, DIMS
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
        placed = put_batch(batch(), DIMS, rows=range(ROWS), mesh=mesh, global_batch_size=ROWS)
        state, metrics = jitted(jax.device_put(first, shardings), {}, placed)
        after = jax.device_get((state, metrics))
        jitted(state, {}, placed)
        assert jitted._cache_size() == 1, "the second step compiled again: a sharding is not pinned"
        return after


FAST = [("fsdp=8", 1, 0.1), ("pipeline=2 context=2 tensor=2", 4, 0.1)]
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(PARITY, (1, 4), (0.1, 0.0))
]


def assert_same_step(after, metrics, expected, expected_metrics):
    assert_close(metrics, expected_metrics, rtol=1e-5)
    # Adam's first moment after one step is a tenth of the clipped gradient; each leaf to 1e-4 of its largest.
    moments, wanted = after.opt_state[1].mu, expected.opt_state[1].mu
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), moments, wanted
    )


@pytest.mark.parametrize(("mesh", "accumulation", "dropout"), CASES)
def test_any_mesh_is_one_device(mesh, accumulation, dropout):
    assert_close(initial(mesh)[2], initial("data=1")[2], rtol=0)
    assert_same_step(*run_step(mesh, accumulation, dropout), *run_step("data=1", 1, dropout))


@pytest.mark.parametrize("mesh", ["fsdp=4 tensor=2", "pipeline=2 tensor=2 data=2"])
def test_attention_in_blocks_is_plain_on_one_device(mesh, monkeypatch):
    monkeypatch.setattr("l1_jax.model.attend.BLOCK", 6)
    assert_same_step(*run_step.__wrapped__(mesh, 4, 0.1, "blocked"), *run_step("data=1", 1, 0.1))


def test_the_stages_of_a_pipeline_keep_what_layers_keep():
    """The products with weights, though they have a dimension of stages there."""
    mesh = create_mesh(sizes("pipeline=2"), jax.devices()[:2])

    def stored_bytes(remat):
        graphdef, initialise, _ = build(MODEL, remat=remat, layout=Layout.of(mesh, ROWS))
        shapes = jax.eval_shape(initialise, jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((ROWS, 16), np.int32)
        with jax.set_mesh(mesh):
            _, backward = jax.eval_shape(
                lambda params, tokens: jax.vjp(lambda p: nnx.merge(graphdef, p)(tokens)[0], params),
                shapes,
                tokens,
            )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    outputs = (
        4 * MODEL.n_layers * ROWS * 16 * (3 * 16 + 64)
    )  # queries, keys, values; the MLP's first
    assert stored_bytes("dots_no_batch") - stored_bytes("full") >= outputs


@pytest.mark.parametrize(
    "mesh", ["fsdp=4 tensor=2", "context=2 fsdp=4", "pipeline=2 context=2 tensor=2"]
)
def test_a_loss_in_parts_is_one_device(mesh, monkeypatch):
    expected, expected_metrics = run_step("data=1", 1, 0.1)
    monkeypatch.setattr("l1_jax.objectives.chunks.choose_num_chunks", lambda **_: 4)
    assert_same_step(*run_step.__wrapped__(mesh, 1, 0.1), expected, expected_metrics)


@pytest.mark.parametrize(
    "mesh", ["fsdp=4 tensor=2", "context=2 data=4", "pipeline=2 context=2 tensor=2"]
)
def test_a_loss_in_parts_that_do_not_divide_the_length(mesh, monkeypatch):
    """16 positions, or 8 on each of two devices, in 3 parts."""
    expected, expected_metrics = run_step("data=1", 1, 0.1)
    monkeypatch.setattr("l1_jax.objectives.chunks.choose_num_chunks", lambda **_: 3)
    assert_same_step(*run_step.__wrapped__(mesh, 1, 0.1), expected, expected_metrics)


def test_a_state_is_the_same_on_any_mesh_after_a_restore(tmp_path):
    def abstract(text):
        _, shardings, first = initial(text)
        return jax.tree.map(
            lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), first, shardings
        )

    shardings = initial("fsdp=4 tensor=2")[1]
    state = run_step("fsdp=4 tensor=2", 1, 0.1)[0]
    saver = Saver(tmp_path, keep=1, texts={})
    saver.save(
        to_trees(jax.device_put(state, shardings)),
        CheckpointInfo(8, 9, "line", "", ""),
        ["checkpoint-1"],
    )
    saver.close()
    for mesh in ("data=1", "fsdp=8", "pipeline=2 context=2 tensor=2"):
        restored = restore_state(tmp_path / "checkpoint-1", abstract(mesh))
        assert (
            restored.params["token_embedding"].sharding
            == initial(mesh)[1].params["token_embedding"]
        )
        assert_close(restored, state, rtol=0)


def test_parameters_and_moments_lie_in_shards():
    mesh = create_mesh(sizes("fsdp=4 tensor=2"), jax.devices())
    _, initialise, axes = build(MODEL)
    optimizer = create_optimizer(TRAINING)
    create = functools.partial(create_state, initialise, optimizer, seed=0, is_float16=False)
    placed = place_state(jax.eval_shape(create), axes, mesh)

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
    mesh = create_mesh(sizes("data=2 fsdp=2 tensor=2"), jax.devices())
    np.testing.assert_array_equal(
        process_rows(mesh, 12), np.arange(12)
    )  # one process holds them all


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "parallelism data 3 needs 3 devices, and there are 8"),
        ((16, 1, 1), "needs 16 devices, and there are 8"),
        ((-1, 3, 1), "3 does not divide 8"),
    ],
)
def test_a_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(UserError, match=message):
        create_mesh(ParallelismConfig(*sizes), jax.devices())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "fsdp=4,",
            "--mesh 'fsdp=4,': '' is no AXIS=SIZE. Write it as in fsdp=4,tensor=2; the axes are pipeline, data",
        ),
        ("fspd=4", "'fspd=4' is no AXIS=SIZE; did you mean 'fsdp'?"),
        ("fsdp", "'fsdp' is no AXIS=SIZE. Write"),
        ("fsdp=2,fsdp=2", "'fsdp=2' is no AXIS=SIZE, or comes twice"),
        ("fsdp=2 tensor=2", "'fsdp=2 tensor=2' is no AXIS=SIZE"),
        ("tensor", "'tensor' is no AXIS=SIZE"),
        ("pipeline_microbatches=4", "'pipeline_microbatches=4' is no AXIS=SIZE"),
        ("data=0", "parallelism.data is 0"),
        ("data=-1,fsdp=-1", "parallelism"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_mesh(text)


def test_the_free_axis_takes_the_rest():
    shape = create_mesh(ParallelismConfig(2, -1, 2), jax.devices()).shape
    assert dict(shape) == {"pipeline": 1, "data": 2, "fsdp": 2, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ("tensor=2", {"n_heads": 3, "n_embd": 48},
         "n_heads 3 is not divisible by parallelism.tensor 2. Set parallelism.tensor to 1, or model.n_heads to 2"),
        ("tensor=4", {"n_heads": 6, "n_embd": 6}, "Set parallelism.tensor to 2."),
        ("tensor=4", {"n_heads": 8, "n_kv_heads": 2, "n_embd": 8},
         "n_kv_heads 2 is not divisible by parallelism.tensor 4. Set parallelism.tensor to 2, or model.n_kv_heads to"),
        ("fsdp=4", {"n_heads": 2, "n_embd": 10},
         "n_embd 10 is not divisible by parallelism.fsdp 4. Set parallelism.fsdp to 2, or model.n_embd to 8"),
        ("fsdp=4", {"n_heads": 3, "n_embd": 9}, "model.n_embd to 12"),
        ("fsdp=4", {"n_heads": 3, "n_embd": 9, "head_size": 4}, "model.n_embd to 8"),
        ("tensor=2", {"n_heads": 2, "n_embd": 8, "n_inner": 9}, "n_inner 9 is not divisible by parallelism.tensor 2"),
        ("pipeline=8", {"n_layers": 12},
         "n_layers 12 is not divisible by parallelism.pipeline 8. Set parallelism.pipeline to 4, or model.n_layers to"),
        ("context=4", {"max_seq_length": 12},
         "max_seq_length 12 is not divisible by parallelism.context 4 x 2 chunks. Set parallelism.context to 2, or"),
        ("context=4", {"max_seq_length": 15}, "Set parallelism.context to 1, or"),
        ("tensor=3", {"vocab_size": 500, "n_heads": 3, "n_embd": 9, "n_inner": 9},
         "the padded vocabulary 512 is not divisible by parallelism.tensor 3. Set parallelism.tensor to 1."),
        ("tensor=3 pipeline=2", {"vocab_size": 500, "n_heads": 3, "n_embd": 9, "n_inner": 9},
         "512 is not divisible by parallelism.tensor 3 x parallelism.pipeline 2"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_divide(mesh, model, message):
    devices = int(np.prod([int(part[-1]) for part in mesh.split()]))
    with pytest.raises(UserError, match=re.escape(message)):
        check_divisible(ModelConfig(**model), create_mesh(sizes(mesh), jax.devices()[:devices]))


@pytest.mark.parametrize("num_microbatches", [1, 2, 4])
def test_a_pipeline_of_any_length_is_its_layers_one_after_the_other(num_microbatches):
    """Also where there are fewer microbatches than stages."""
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(6, 8, 8)).astype(np.float32)
    x = rng.normal(size=(4, 2, 8)).astype(np.float32)
    shift = rng.normal(size=(4, 1, 1)).astype(np.float32)

    def stage(layers, x, shift):
        y = functools.reduce(lambda x, layer: np.tanh(1) * x @ layer + shift, layers, x)
        return y, {"ones": shift[:, 0, 0] * len(layers)}

    with jax.set_mesh(create_mesh(sizes("data=1"), jax.devices()[:1])):
        y, sums = jax.jit(
            lambda layers, x, shift: run_stages(
                stage,
                layers,
                x,
                shift,
                input_dims=("batch", None, None),
                num_stages=3,
                num_microbatches=num_microbatches,
            )
        )(layers, x, shift)
    expected, _ = stage(layers, x, shift)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)

    # What idle stages make does not count.
    np.testing.assert_allclose(sums["ones"].sum(), 6 * shift.sum(), rtol=1e-5)


def test_the_microbatches_of_a_pipeline():
    for asked, rows, stages, expected in (
        (None, 6, 1, 1),
        (None, 64, 2, 8),
        (None, 6, 2, 6),
        (None, 7, 2, 7),
        (3, 6, 2, 3),
    ):
        assert choose_microbatches(asked, rows, stages) == expected
    with pytest.raises(
        UserError,
        match=r"pipeline_microbatches 4 does not divide the 6 sequences a device\. Set it to 3",
    ):
        choose_microbatches(4, 6, 2)


def test_zigzag_is_balanced():
    for parts in (1, 2, 4):
        order = zigzag(16, parts).reshape(parts, -1)
        assert sorted(order.ravel()) == list(range(16))
        assert len(set(order.sum(axis=1))) == 1  # the keys that its queries see


def test_an_absent_device_is_refused():
    for device in ("gpu", "cuda", "tpu"):
        with pytest.raises(UserError, match=f"the device '{device}' is asked for"):
            select_devices(device)
    assert len(select_devices("cpu")) == len(select_devices("auto")) == 8


@pytest.mark.parametrize("nodes", ["a", "a1,b2", "gpu[001-004,7]", "gpu-a[12,14]", "gpu[3]"])
def test_where_slurm_tasks_meet(nodes, monkeypatch):
    """Where jax would, which has no public way to ask."""
    variables = {"SLURM_JOB_ID": "70001", "SLURM_STEP_NODELIST": nodes}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert slurm_address(variables) == SlurmCluster.get_coordinator_address(None, None).replace(
        "]", ""
    )


NO_TPU = """
import importlib.util, pathlib, jax
importlib.util.find_spec = lambda name: True
pathlib.Path.exists = lambda path: str(path) == "/dev/vfio/0"
from l1_jax.devices import processes
processes.start(None, None, None)
print(jax.distributed.is_initialized(), jax.process_count())
"""


def test_libtpu_beside_another_devices_driver_is_no_pod():
    result = subprocess.run(
        [sys.executable, "-c", NO_TPU], cwd=ROOT, capture_output=True, text=True
    )
    assert result.stdout == "False 1\n", result.stderr
