"""Checkpoints on disk: what is kept, what a crash leaves, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from l1_jax.checkpoint import saver as saving
from l1_jax.checkpoint import write as writing
from l1_jax.checkpoint.manifest import CheckpointInfo, read_info
from l1_jax.checkpoint.restore import find_checkpoint
from l1_jax.checkpoint.saver import Saver
from l1_jax.errors import RunError, UserError
from l1_jax.parallel.mesh import ALL_DATA, create_mesh
from l1_jax.run import guard
from l1_jax.training.health import Health, LossScale
from l1_jax.training.initial import restore_params, restore_state
from l1_jax.training.state import TrainState, to_trees

INFO = CheckpointInfo(
    global_batch_size=8, total_steps=9, documents="line", data_hash="", tokenizer_sha256=""
)


def state_at(step):
    params = {
        "a": jax.numpy.full((3, 2), step, "float32"),
        "b": {"c": jax.numpy.arange(4.0) * step},
    }
    moments = (jax.tree.map(lambda p: p + 1, params), jax.numpy.int32(step))
    number, count = (
        (lambda: jax.numpy.float32(step)),
        (lambda: jax.numpy.int32(0)),
    )  # each has its own buffer
    health = Health(number(), number(), count(), count())
    return TrainState(jax.numpy.int32(step), params, moments, LossScale(number(), count()), health)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(run_dir, step, *names, keep=2):
    saver = Saver(run_dir, keep=keep, texts={"config.yaml": f"# {step}"})
    saver.save(to_trees(state_at(step)), dataclasses.replace(INFO, step=step), list(names))
    saver.close()


def test_what_is_saved_is_restored_even_if_the_buffers_are_used_again(tmp_path):
    saver = Saver(tmp_path, keep=2, texts={"config.yaml": "x"})
    state = state_at(7)
    expected = jax.device_get(state)
    saver.save(to_trees(state), INFO, ["checkpoint-7"])
    jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)(state)
    saver.close()
    restored = restore_state(tmp_path / "checkpoint-7", abstract(state_at(7)))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    params = restore_params(tmp_path / "checkpoint-7", abstract(state_at(7)).params)
    jax.tree.map(np.testing.assert_array_equal, params, expected.params)


def test_no_step_waits_for_a_save(tmp_path, monkeypatch):
    """On CPU Orbax holds the memory of what it writes, which the next step is to reuse."""
    saver, given = Saver(tmp_path, keep=2, texts={}), []
    saver._open(to_trees(state_at(7)))
    write = saver._checkpointer.save
    monkeypatch.setattr(
        saver._checkpointer, "save", lambda path, args: [given.append(args), write(path, args=args)]
    )
    state = state_at(7)
    saver.save(to_trees(state), INFO, ["checkpoint-7"])
    saver.close()
    arrays = {
        x.unsafe_buffer_pointer()
        for x in jax.tree.leaves([item.item for item in given[0].values()])
    }
    assert len(arrays) == len(jax.tree.leaves(state))
    assert not arrays & {x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}


def test_without_memory_for_a_copy_the_state_itself_is_written(tmp_path, monkeypatch, caplog):
    def full(_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(saving.log, "propagate", True)
    monkeypatch.setattr(writing, "_copy", full)
    save(tmp_path, 7, "checkpoint-7")
    assert "no memory for a copy of the state (RESOURCE_EXHAUSTED)" in caplog.text
    restored = restore_state(tmp_path / "checkpoint-7", abstract(state_at(7)))
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state_at(7)))


@pytest.mark.parametrize(
    "value", [np.nan, np.inf, -np.inf, np.finfo("float32").max, -np.finfo("float32").max, 1e-45]
)
def test_what_is_not_finite_is_found_wherever_it_is(value):
    mesh = create_mesh(ALL_DATA, jax.devices()[:1])
    for shape, place in (
        ((3, 4, 5), (2, 3, 4)),
        ((7,), (0,)),
        ((), ()),
        ((1, 1), (0, 0)),
        ((256, 300), (128, 31)),
    ):
        x = np.ones(shape, np.float32)
        x[place] = value
        state = dataclasses.replace(state_at(1), params={"x": jax.numpy.asarray(x)})
        if np.isfinite(value):
            guard.check_finite(state, mesh, 1)
            continue
        with pytest.raises(RunError, match=r"params.x holds numbers that are not finite"):
            guard.check_finite(state, mesh, 1)


def test_the_newest_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, "checkpoint-1", "best_model")
    for step in (2, 3, 10):
        save(tmp_path, step, f"checkpoint-{step}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best_model",
        "checkpoint-10",
        "checkpoint-3",
    ]
    assert read_info(tmp_path / "best_model").step == 1
    best = restore_state(tmp_path / "best_model", abstract(state_at(1)))
    np.testing.assert_array_equal(best.params["a"], np.ones((3, 2)))


def test_an_unfinished_save_has_no_checkpoints_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        saving, "flush", lambda path: seen.extend(p.name for p in tmp_path.iterdir())
    )
    save(tmp_path, 5, "checkpoint-5")
    assert seen == [".saving-5"]


def test_a_failed_save_is_raised_and_leaves_the_older_steps(tmp_path, monkeypatch):
    save(tmp_path, 1, "checkpoint-1")

    def fail(path):
        raise OSError("no space left")

    monkeypatch.setattr(saving, "flush", fail)
    with pytest.raises(
        RunError,
        match=r"step 2 could not be saved in .* \(no space left\): it needs at least 0.0 MB, and ",
    ):
        save(tmp_path, 2, "checkpoint-2")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("second_rename_done", [False, True])
def test_a_kill_between_the_renames_of_the_best_model(tmp_path, second_rename_done):
    save(tmp_path, 1, "best_model")
    shutil.copytree(tmp_path / "best_model", tmp_path / ".saving-2")
    (tmp_path / ".deleting-checkpoint-0").mkdir()
    (tmp_path / "best_model").rename(tmp_path / ".old-best_model")
    if second_rename_done:
        (tmp_path / ".saving-2").rename(tmp_path / "best_model")
    saving.recover(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["best_model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"a": jax.ShapeDtypeStruct((2, 2), "float32")},
            r"a is float32\[3, 2\] there and float32\[2, 2\] here",
        ),
        (
            lambda p: p | {"a": jax.ShapeDtypeStruct((3, 2), "bfloat16")},
            r"float32\[3, 2\] there and bfloat16",
        ),
        (lambda p: p | {"new": jax.ShapeDtypeStruct((1,), "float32")}, "new is missing there"),
        (lambda p: {"a": p["a"]}, r"b.c is float32\[4\] there and missing here"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, change, message):
    save(tmp_path, 1, "checkpoint-1")
    with pytest.raises(UserError, match=message):
        restore_params(tmp_path / "checkpoint-1", change(abstract(state_at(1)).params))


def test_what_a_path_means(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.json").write_text(json.dumps(dataclasses.asdict(INFO)))
    (tmp_path / "checkpoint-30").mkdir()  # a stray directory
    assert find_checkpoint(tmp_path).name == "checkpoint-10"
    assert find_checkpoint(tmp_path / "checkpoint-2.pt").name == "checkpoint-2"
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "best_model")
    assert find_checkpoint(str(tmp_path)).name == "best_model"
    (tmp_path / "checkpoint-2.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="a file, perhaps a PyTorch one"):
        find_checkpoint(tmp_path / "checkpoint-2.pt")
    with pytest.raises(
        UserError,
        match=r"there is no checkpoint .*7\. Beside it are: best_model, checkpoint-10, checkpoint-2",
    ):
        find_checkpoint(tmp_path / "checkpoint-7")
    with pytest.raises(UserError, match="is not a checkpoint and holds none"):
        find_checkpoint(tmp_path / "checkpoint-30")
