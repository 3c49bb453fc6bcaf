"""The average of the weights, `training.ema_decay`: what it is, where it is used, what it survives."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from e2e.test_run import train_args
from test_initial import INFO
from test_initial import same as assert_same
from test_seams import FREEZE, program_on, rows_of
from test_training import assert_close

import l1_jax
from l1_jax.checkpoint.write import write
from l1_jax.errors import UserError
from l1_jax.parallel.placement import put_batch, put_flag
from l1_jax.training.initial import choose_weights, restore_params, restore_state
from l1_jax.training.state import to_trees

DECAY = 0.75
KEEPS = f"training.ema_decay={DECAY}"


def train(mesh, program, state, steps=1, weight=1.0):
    """The state after some steps, and its weights after each."""
    rows = rows_of()
    rows["weights"] = weight * rows["weights"]
    batch = put_batch(rows, program.dims, rows=range(8), mesh=mesh, global_batch_size=8)
    batch |= {"stop": put_flag(False, mesh)}

    seen = []
    for _ in range(steps):
        state, _ = program.train_step(state, program.borrowed, batch)
        seen.append(jax.device_get(state.params))
    return state, seen


@pytest.mark.parametrize("mesh_text", ["data=1", "data=2 fsdp=2 tensor=2", "pipeline=2 context=2"])
def test_the_average_by_hand(mesh_text):
    with program_on(mesh_text, KEEPS) as (mesh, program):
        state = program.create()
        expected = jax.device_get(state.params)
        assert_same(jax.device_get(state.beside["average"]), expected)

        # It lies as the weights do.
        placed = jax.tree.map(lambda leaf: leaf.sharding, state.params)
        assert jax.tree.map(lambda leaf: leaf.sharding, state.beside["average"]) == placed

        state, seen = train(mesh, program, state, steps=3)
        for params in seen:
            expected = jax.tree.map(lambda a, p: DECAY * a + (1 - DECAY) * p, expected, params)
        assert_close(state.beside["average"], expected, rtol=1e-5, atol=1e-7)
        assert_same(state.evaluated, state.beside["average"])


def test_the_step_is_that_of_a_run_without_it():
    """To rounding: it is another program."""
    found = []
    for overrides in ((), (KEEPS,)):
        with program_on("data=2 fsdp=2", *overrides) as (mesh, program):
            state, _ = train(mesh, program, program.create())
            found.append(jax.device_get(state.opt_state))
    assert_close(*found, rtol=1e-3, atol=1e-6)


def test_a_refused_step_leaves_it():
    keys = (KEEPS, "training.on_nonfinite=skip")
    with program_on("data=1", *keys) as (mesh, program):
        state, _ = train(mesh, program, program.create())
        before = jax.device_get((state.params, state.beside))

        state, _ = train(mesh, program, state, weight=np.float32("nan"))
        assert int(state.health.refused) == 1
        assert_same(jax.device_get((state.params, state.beside)), before)


@pytest.mark.parametrize("overrides", [(KEEPS,), (KEEPS, FREEZE)])
def test_it_is_saved_whole_and_restored(overrides, tmp_path):
    """Of a run with frozen layers too: it is a model by itself."""
    saved = tmp_path / "saved"
    with program_on("data=2 fsdp=2", *overrides) as (mesh, program):
        state, _ = train(mesh, program, program.create(), steps=2)
        write(saved, to_trees(state), {"config.yaml": "x"}, INFO)
        assert_same(restore_state(saved, program.abstract), state)
        evaluated = jax.device_get(
            to_trees(dataclasses.replace(state, params=state.beside["average"]))
        )

    with program_on("tensor=2") as (mesh, program):
        assert choose_weights(saved) == choose_weights(saved, "average") == "average"
        assert choose_weights(saved, "raw") == "params"
        average = restore_params(saved, program.abstract.params, choose_weights(saved))
        assert_same(jax.device_get(average), evaluated["params"])


def test_set_at_a_resume_it_begins_with_the_weights(tmp_path):
    saved = tmp_path / "saved"
    with program_on("data=2 fsdp=2") as (mesh, program):
        state, _ = train(mesh, program, program.create())
        write(saved, to_trees(state), {"config.yaml": "x"}, INFO)
        params = jax.device_get(state.params)

    with program_on("data=2 fsdp=2", KEEPS) as (mesh, program):
        resumed = restore_state(saved, program.abstract)
        assert_same(jax.device_get(resumed.beside["average"]), params)
        placed = jax.tree.map(lambda leaf: leaf.sharding, program.abstract.beside)
        assert jax.tree.map(lambda leaf: leaf.sharding, resumed.beside) == placed

        # Arrays of its own: the step is given both, and may write over both.
        train(mesh, program, resumed)


def test_which_weights_are_used(script, tiny_config, prepared, tmp_path):
    """Validation, evaluation, generation and a run that begins with them take the average."""
    run = tmp_path / "run"
    keys = ["training.max_steps=20", "training.eval_steps=20", "training.eval_batches=null"]
    result = script("train", *train_args(tiny_config, prepared, run, *keys, KEEPS))
    assert result.code == 0, result.err

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (validated,) = (row["val/loss"] for row in rows if "val/loss" in row)
    text = prepared / "val.txt"

    def loss(*flags):
        result = script("evaluate", "--model", run, "--data", text, "--json", *flags)
        assert result.code == 0, result.err
        return json.loads(result.out)["loss"]

    assert loss() == loss("--weights", "average") == pytest.approx(validated, rel=1e-6)
    assert abs(loss("--weights", "raw") - validated) > 1e-3

    average = l1_jax.load(run)
    raw = l1_jax.load(run, weights="raw")
    assert not np.array_equal(average.params["token_embedding"], raw.params["token_embedding"])
    generated = script(
        "generate", "--model", run, "--prompt", "a", "--max-tokens", "4", "--weights", "raw"
    )
    assert generated.code == 0, generated.err

    keys = [f"transfer.from={run}", "training.max_steps=1", "training.learning_rate=1e-30"]
    begun = script("train", *train_args(tiny_config, prepared, tmp_path / "begun", *keys))
    assert f"starting with the average of the weights of {run}" in begun.err
    weights = l1_jax.load(tmp_path / "begun").params["token_embedding"]
    np.testing.assert_array_equal(weights, average.params["token_embedding"])


def test_where_there_is_none(script, trained, prepared):
    result = script(
        "evaluate", "--model", trained, "--data", prepared / "val.txt", "--weights", "average"
    )
    assert result.code == 2
    assert "best_model has no average of its weights. Leave --weights out" in result.error

    with pytest.raises(UserError, match=r"`weights` is 'ema'. Give average or raw"):
        l1_jax.load(trained, weights="ema")
