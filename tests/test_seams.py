"""A second of everything: a part of a block, an objective, the hidden states of layers."""

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_parallel
from conftest import ROOT
from e2e.test_run import train_args
from flax import nnx
from test_initial import INFO
from test_initial import same as assert_same
from test_parallel import MODEL, ROWS, batch, run_step, sizes
from test_training import assert_close

from l1_jax.checkpoint.manifest import CheckpointInfo
from l1_jax.checkpoint.write import write
from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.yaml_file import config_from_text, dump_config
from l1_jax.errors import UserError
from l1_jax.model import block as block_module
from l1_jax.model.context import Sum
from l1_jax.model.flops import count_frozen, count_parameters, flops_per_token
from l1_jax.model.layers import MLP
from l1_jax.model.stack import group_layers, join_stack, split_like, split_stack
from l1_jax.model.transformer import build
from l1_jax.objectives.cross_entropy import loss_sum
from l1_jax.objectives.log_probs import token_log_probs
from l1_jax.objectives.next_token import NextToken, run_model
from l1_jax.objectives.objective import Terms
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import put_batch, put_flag
from l1_jax.parallel.section import MESH_AXES
from l1_jax.planner.state_size import state_bytes
from l1_jax.run import drift
from l1_jax.training.initial import restore_params, restore_state
from l1_jax.training.program import make_program
from l1_jax.training.state import to_trees
from l1_jax.training.step import make_eval_step


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


@dataclasses.dataclass(frozen=True)
class WholeRows:
    """The mean over rows of what the targets of a row cost together; a batch has no weights."""

    def num_tokens(self, batch):
        return jnp.float32(batch["targets"].size)

    def weight(self, batch):
        return jnp.float32(len(batch["targets"]))

    def __call__(self, graphdef, params, borrowed, batch, keys_B=None):
        model, output = run_model(graphdef, params, batch, keys_B)
        log_probs = token_log_probs(model, output.hidden, batch["targets"][..., None], num_chunks=3)
        return Terms(-log_probs.sum(), {})

    def validate(self, graphdef, params, borrowed, batch):
        return Sum(self(graphdef, params, borrowed, batch).loss, self.weight(batch))


@pytest.mark.parametrize("mesh", ["fsdp=4 tensor=2", "pipeline=2 context=2 tensor=2"])
def test_an_objective_of_fields_of_its_own(mesh, monkeypatch):
    """It is 16 times the loss of the next token, and validates as such."""
    rows = batch()
    weights = np.ones_like(rows.pop("weights"))
    monkeypatch.setattr(test_parallel, "batch", lambda: rows)
    objective = WholeRows()
    state, metrics = run_step.__wrapped__(mesh, 4, 0.0, objective=objective)

    monkeypatch.setattr(test_parallel, "batch", lambda: rows | {"weights": weights})
    _, per_token = run_step.__wrapped__("data=1", 1, 0.0)
    assert_close(metrics["loss"], 16 * per_token["loss"], rtol=1e-5)
    assert_close(metrics["grad_norm"], 16 * per_token["grad_norm"], rtol=1e-4)
    assert metrics["tokens"] == per_token["tokens"] == ROWS * 16

    graphdef = build(dataclasses.replace(MODEL, dropout=0.0))[0]
    validated = make_eval_step(graphdef, objective)(state.params, {}, rows)
    rows["weights"] = weights
    expected = make_eval_step(graphdef, NextToken(z_loss=0.1))(state.params, {}, rows)
    assert_close(validated.loss, expected.loss, rtol=1e-5)
    assert (validated.weight, expected.weight) == (ROWS, ROWS * 16)


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


def test_who_changes_dropout_changes_that_of_attention_too():
    """Also on top of the config that a run wrote."""
    config = config_from_text(TEXT + "\n", "c.yaml", ["model.dropout=0.3"])
    written = dump_config(
        resolve(config, Facts(64, rows_of_stream(10**5), dict.fromkeys(MESH_AXES, 1), "cpu"))
    )
    again = config_from_text(written, "c.yaml", ["model.dropout=0.0", "model.n_embd=64"])
    assert again.model.attention_rate == 0
    assert not again.model.drops
    assert again.model.head_dims == 32


def test_kernels_run_without_dropout_of_weights():
    from l1_jax.config.schema import Config
    from l1_jax.model.backends import obstacle

    config = Config(model=dataclasses.replace(MODEL, max_seq_length=128, attention_dropout=0.0))
    mesh = create_mesh(sizes("data=1"), jax.devices()[:1])
    assert config.model.dropout > 0
    assert obstacle("splash", config, mesh, config.model.attention_rate, "tpu") is None
    why = obstacle("splash", config, mesh, MODEL.attention_rate, "tpu")
    assert "model.attention_dropout" in why


TEXT = """\
model: {vocab_size: 64, max_seq_length: 16, n_layers: 4, n_heads: 2, n_embd: 32}
training: {max_steps: 5, global_batch_size: 8, learning_rate: 0.1, warmup_steps: 0}
"""


def rows_of(seed=0):
    tokens = np.random.default_rng(seed).integers(0, 64, (8, 16)).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    weights = np.ones((8, 16), np.float32)
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "row_hash": np.arange(8, dtype=np.uint32),
    }


@contextlib.contextmanager
def program_on(mesh_text, *overrides, **options):
    parallelism = sizes(mesh_text)
    mesh = create_mesh(parallelism, jax.devices()[: np.prod(list(parallelism_sizes(parallelism)))])
    config = config_from_text(TEXT, "c.yaml", overrides)
    config = config.replace("parallelism", **vars(parallelism))
    resolved = resolve(config, Facts(64, rows_of_stream(10**5), dict(mesh.shape), "cpu"))
    with jax.set_mesh(mesh):
        yield mesh, make_program(resolved, mesh, **options)


def parallelism_sizes(parallelism):
    return (getattr(parallelism, axis) for axis in MESH_AXES)


def one_step(mesh, program, state):
    batch = put_batch(rows_of(), program.dims, rows=range(8), mesh=mesh, global_batch_size=8)
    batch |= {"stop": put_flag(False, mesh)}
    compiled = program.train_step.lower(state, program.borrowed, batch).compile()
    state, metrics = compiled(state, program.borrowed, batch)
    return state, metrics, compiled


FREEZE = r"transfer.freeze=['blocks\.[01]\.', embedding]"


@pytest.mark.parametrize("mesh_text", ["data=1", "data=2 fsdp=2", "tensor=2"])
def test_frozen_layers(mesh_text, tmp_path):
    """They have no moments and never change; a checkpoint has all layers stacked as ever."""
    with program_on(mesh_text) as (mesh, program):
        everything = program.create()
        whole_trees = jax.device_get(to_trees(everything))
        whole_state, whole_metrics, whole = one_step(mesh, program, everything)
        del whole_state

    with program_on(mesh_text, FREEZE) as (mesh, program):
        state = program.create()
        assert set(state.held["blocks"]) == {"0-1"}
        assert set(state.params["blocks"]) == {"2-3"}
        assert set(state.params) == {"blocks", "final_norm"}
        # To rounding, for they are drawn by another program.
        saved = jax.device_get(to_trees(state))["params"]
        assert_close(saved, whole_trees["params"], rtol=1e-5, atol=1e-8)

        held = jax.device_get(state.held)
        before = jax.device_get(state.params)
        state, metrics, frozen = one_step(mesh, program, state)
        assert_same(jax.device_get(state.held), held)
        changed = jax.tree.map(
            lambda a, b: bool((a != b).any()), jax.device_get(state.params), before
        )
        assert all(jax.tree.leaves(changed))

        # The loss is the same, and the gradient a part of it.
        assert_close(metrics["loss"], whole_metrics["loss"], rtol=1e-6)
        assert 0 < metrics["grad_norm"] < whole_metrics["grad_norm"]

        # Moments of the trained alone; and less is kept for the backward pass.
        sizes_of = [
            sum(leaf.size for leaf in jax.tree.leaves(x)) for x in (state.opt_state, before)
        ]
        assert sizes_of[0] == 2 * sizes_of[1] + 1
        kept, kept_whole = (c.memory_analysis().temp_size_in_bytes for c in (frozen, whole))
        assert kept < 0.8 * kept_whole

        # What is saved is read by the same run, and by one that trains all.
        write(tmp_path / "saved", to_trees(state), {"config.yaml": "x"}, INFO)
        abstract = program.abstract
        assert_same(restore_state(tmp_path / "saved", abstract), state)
        eval_model = nnx.merge(program.eval_graphdef, state.weights)
        hidden = eval_model(rows_of()["tokens"]).hidden

    with program_on(mesh_text) as (mesh, program):
        weights = restore_params(tmp_path / "saved", program.abstract.params)
        model = nnx.merge(program.eval_graphdef, weights)
        assert_close(model(rows_of()["tokens"]).hidden, hidden, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_frozen_is_said():
    cases = {
        (
            "pipeline=2",
            r"transfer.freeze=['blocks\.0\.']",
        ): "layers in 2 ways (layers 0-0, layers 1-3)",
        ("data=1", "transfer.freeze=[nothing]"): "'nothing', which finds no parameter",
        ("data=1", "transfer.freeze=['.']"): "finds all parameters",
    }
    for (mesh_text, override), message in cases.items():
        with pytest.raises(UserError, match=re.escape(message)), program_on(mesh_text, override):
            pass


def test_a_pattern_that_is_none_is_a_mistake_of_the_config():
    with pytest.raises(UserError, match=r"'\(', which is no regular expression"):
        config_from_text("transfer: {freeze: ['(']}", "c.yaml")


def test_an_absent_section_freezes_what_an_empty_one_does():
    info = CheckpointInfo(8, 9, "line", "", "")
    absent, empty = (
        drift.facts(config_from_text(text, "c.yaml"), info) for text in ("", "transfer: {}")
    )
    assert absent == empty


def test_what_is_frozen_is_the_same_after_a_resume(
    script, trained, tiny_config, prepared, tmp_path
):
    """Its moments are not in the checkpoint, so no flag allows it."""
    keys = (r"transfer.freeze=['blocks\\.0\\.']", "training.max_steps=101")
    args = (*train_args(tiny_config, prepared, tmp_path / "run", *keys), "--resume", trained)

    result = script("train", *args)
    assert result.code == 2
    assert f"or begin a run with transfer.from: {trained}" in result.error

    # Nor is it lost among others that a flag would allow.
    result = script("train", *args, "training.seed=7")
    assert result.code == 2
    assert "transfer.freeze: " in result.err
    assert "training.seed: 42 there, 7 now" in result.err
    assert f"or begin a run with transfer.from: {trained}" in result.error

    result = script("train", *args, "--allow-change", "transfer.freeze")
    assert result.code == 2
    assert "a change of transfer.freeze cannot be allowed" in result.error


def test_a_pipeline_may_freeze_the_same_of_all_layers():
    with program_on("pipeline=2", r"transfer.freeze=['\.mlp\.']") as (mesh, program):
        state = program.create()
        held = jax.device_get(state.held)
        state, _, _ = one_step(mesh, program, state)
        assert_same(jax.device_get(state.held), held)
        assert set(state.held["blocks"]) == {"mlp"}


def test_groups_are_the_stack(monkeypatch):
    tree = {"blocks": {"a": np.arange(5), "b": {"c": np.arange(10).reshape(5, 2)}}, "d": np.ones(1)}
    treatments = {"0": 1, "1": 1, "2": 2, "3": 1, "4": 1}
    groups = group_layers(5, ["a", "b.c"], lambda path: treatments[path.split(".")[1]])
    assert groups == ((0, 2), (2, 3), (3, 5))
    split = split_stack(tree, groups)
    assert set(split["blocks"]) == {"0-1", "2-2", "3-4"}
    assert_same(join_stack(split), tree)
    assert_same(split_like(tree, split), split)
    assert split_stack(tree, groups[:1]) is tree


def test_a_plan_knows_what_is_frozen():
    found = []
    for overrides in ((), (FREEZE,), (FREEZE, "training.optimizer=muon")):
        config = config_from_text(TEXT, "c.yaml", overrides)
        mesh = create_mesh(sizes("data=1"), jax.devices()[:1])
        resolved = resolve(config, Facts(64, rows_of_stream(10**5), dict(mesh.shape), "cpu"))
        found.append(state_bytes(resolved, mesh))
    whole, frozen, muon = found
    assert frozen.params == whole.params == muon.params
    assert frozen.num_parameters == whole.num_parameters
    assert whole.trained == whole.params
    assert frozen.state == frozen.params + 2 * frozen.trained + (whole.state - 3 * whole.params)
    assert muon.optimizer_flops > 0


@pytest.mark.parametrize("frozen", [FREEZE, r"transfer.freeze=['\.mlp\.']", "transfer.freeze=[]"])
def test_the_flops_of_a_step_with_frozen_layers(frozen):
    """Against those that XLA counts: what freezing saves of the products."""
    wide = ("model.n_embd=512", "model.max_seq_length=128", "model.scan_layers=false")
    wide += ("training.attention=plain", "training.gradient_checkpointing=none")

    def count(override):
        with program_on("data=1", *wide, override) as (_, program):
            state = program.abstract
            rows = jax.ShapeDtypeStruct((8, 128), jnp.int32)
            batch = {
                "tokens": rows,
                "targets": rows,
                "weights": jax.ShapeDtypeStruct((8, 128), jnp.float32),
                "row_hash": jax.ShapeDtypeStruct((8,), jnp.uint32),
                "stop": jax.ShapeDtypeStruct((1,), jnp.bool),
            }
            model = config_from_text(TEXT, "c.yaml", wide).model
            by_xla = program.train_step.lower(state, {}, batch).cost_analysis()["flops"] / (8 * 128)
            size = count_parameters(model, state.weights)
            return by_xla, flops_per_token(
                size, model, count_frozen(model, state.params, state.held)
            )

    by_xla, by_formula = count(frozen)
    assert by_formula == pytest.approx(by_xla, rel=0.1)


@pytest.mark.slow
def test_kills_of_a_run_with_frozen_layers_a_z_loss_and_an_average(tiny_config, prepared, tmp_path):
    """The same bits as without a kill -9 in the middle."""
    keys = (r"transfer.freeze=['blocks\.0\.']", "objective.z_loss=0.01")
    keys += ("training.ema_decay=0.9", "training.max_steps=24", "training.save_steps=3")
    keys += ("training.eval_steps=6", "training.eval_batches=1", "training.logging_steps=1")

    def command(name, *flags):
        args = train_args(tiny_config, prepared, tmp_path / name, *keys)
        return [sys.executable, str(ROOT / "scripts/train.py"), *map(str, args), *flags]

    def content(name):
        timed = ("_CHECKPOINT_METADATA", "commit_success.txt")
        last = tmp_path / name / "checkpoint-24" / "state"
        files = [path for path in last.rglob("*") if path.is_file() and path.name not in timed]
        return {path.relative_to(last): path.read_bytes() for path in files}

    subprocess.run(command("whole"), check=True, capture_output=True)

    killed = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint-6").exists() and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL

    subprocess.run(command("killed", "--resume"), check=True, capture_output=True)
    assert content("killed") == content("whole")
    assert any(path.parts[0] == "average" for path in content("whole"))
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    logged = [row["train/z_loss"] for row in rows if "train/z_loss" in row]
    assert len(logged) == 24
    assert all(value > 0 for value in logged)
