"""Where a run's arrays come from, and the kinds of arrays: trained, held, and trees beside them."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from e2e.test_run import train_args

from l1_jax.checkpoint.manifest import CheckpointInfo, find_damage, read_info
from l1_jax.checkpoint.origin import as_origin
from l1_jax.checkpoint.write import write
from l1_jax.config.resolve import Facts, resolve, rows_of_stream
from l1_jax.config.yaml_file import config_from_text, load_config
from l1_jax.errors import UserError
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import put_batch, put_flag
from l1_jax.training.initial import Weights, restore_params, restore_state, transfer_weights
from l1_jax.training.program import make_program
from l1_jax.training.state import merge, partition, to_trees

INFO = CheckpointInfo(8, 9, "line", "data", "tokenizer")


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def program_of(config, mesh, **options):
    facts = Facts(config.model.vocab_size, rows_of_stream(10**5), dict(mesh.shape), "cpu")
    resolved = resolve(config, facts)
    return resolved, make_program(resolved, mesh, **options)


@pytest.fixture
def mesh():
    config = config_from_text("parallelism: {data: 2, fsdp: 2}", "c.yaml")
    with jax.set_mesh(create_mesh(config.parallelism, jax.devices()[:4])) as mesh:
        yield create_mesh(config.parallelism, jax.devices()[:4])
    del mesh


def test_a_run_starts_with_the_weights_of_another_checkpoint(
    script, trained, tiny_config, prepared, tmp_path
):
    keys = (f"transfer.from={trained}", "training.max_steps=2", "training.save_steps=1")
    args = train_args(tiny_config, prepared, tmp_path / "run", *keys)
    result = script("train", *args)
    assert result.code == 0, result.err
    assert f"starting with the weights of {trained}/best_model" in result.err
    assert read_info(tmp_path / "run" / "checkpoint-1").step == 1

    # It goes on as any run, and where it came from is a part of what it is.
    other = script("train", *args[:-3], *keys[1:], "--resume")
    assert other.code == 2
    assert f"another value of transfer.from: {trained} there, null now" in other.error
    assert "nothing left to do" in script("train", *args, "--resume").err


def test_a_run_that_left_no_checkpoint_begins_with_the_same_weights_again(
    script, trained, tiny_config, prepared, tmp_path
):
    """And not with those of the best model, which may be another one by now."""
    source = shutil.copytree(trained, tmp_path / "source")
    run = tmp_path / "run"
    keys = (f"transfer.from={source}", "training.max_steps=2")
    args = train_args(tiny_config, prepared, run, *keys)
    assert script("train", *args).code == 0
    first = (run / "checkpoint-2" / "state" / "params").rglob("*")

    begun = json.loads((run / "run.json").read_text())["transfer"]
    assert begun == dataclasses.asdict(as_origin(source / "best_model"))
    arrays = {path.name: path.read_bytes() for path in first if path.is_file()}

    def restart():
        """As after a kill before the first save."""
        for name in ("checkpoint-2", "best_model"):
            shutil.rmtree(run / name, ignore_errors=True)
        return script("train", *args, "--resume")

    better = shutil.copytree(run / "checkpoint-2", tmp_path / "better")
    shutil.rmtree(source / "checkpoint-100")
    kept = (source / "best_model").rename(source / "checkpoint-100")
    shutil.copytree(better, source / "best_model")
    again = restart()
    assert again.code == 0, again.err
    assert f"starting with the weights of {kept}" in again.err
    second = (run / "checkpoint-2" / "state" / "params").rglob("*")
    assert {path.name: path.read_bytes() for path in second if path.is_file()} == arrays

    shutil.rmtree(kept)
    gone = restart()
    assert gone.code == 2
    assert "which is not there any more" in gone.error

    for key, shown in (([f"transfer.from={better}"], better), ([], "null")):
        args = train_args(tiny_config, prepared, run, *key, keys[1])
        other = restart()
        assert other.code == 2
        assert f"and transfer.from is {shown}" in other.error


def test_the_same_weights_by_another_path_are_no_other_run(
    script, trained, tiny_config, prepared, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.chdir(trained.parent)

    def start(source, *flags):
        keys = (f"transfer.from={source}", "training.max_steps=2")
        return script("train", *train_args(tiny_config, prepared, run, *keys), *flags)

    assert start(trained).code == 0
    for path in (
        trained.name,
        f"./{trained.name}/best_model",
        shutil.copytree(trained, tmp_path / "copy"),
    ):
        again = start(path, "--resume")
        assert again.code == 0, again.err
        assert "nothing left to do" in again.err
    assert start(run, "--resume").code == 2

    with pytest.raises(UserError, match=r"transfer\.from is empty"):
        config_from_text("transfer: {from: ''}", "c.yaml")


def test_the_weights_are_those_of_the_checkpoint(trained, mesh):
    source = trained / "best_model"
    config = load_config(source / "config.yaml", ["parallelism.data=2", "parallelism.fsdp=2"])
    resolved, program = program_of(config.replace("training", batch_size=2), mesh)
    sha256 = read_info(source).tokenizer_sha256

    state = transfer_weights(Weights(source, "params"), program, resolved, sha256)
    same(state.params, restore_params(source, program.abstract.params))
    assert state.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert placed == jax.tree.map(lambda leaf: leaf.sharding, program.abstract)


def test_all_that_does_not_match_is_said_at_once(trained, mesh):
    source = trained / "best_model"
    overrides = ["model.n_layers=4", "model.bias=false", "model.activation=relu_squared"]
    config = load_config(source / "config.yaml", [*overrides, "training.batch_size=2"])
    resolved, program = program_of(config, mesh)

    with pytest.raises(UserError, match="does not match this model") as caught:
        transfer_weights(Weights(source, "params"), program, resolved, "another")
    said = "\n".join(caught.value.details)
    assert "not in this model: blocks.attention.out.bias, float32[2, 32]" in said
    assert "blocks.mlp.up.kernel is float32[2, 32, 128] there and float32[4, 32, 128] here" in said
    assert "model.activation is gelu there and relu_squared here" in said
    assert "its tokenizer is another one" in said


def test_what_is_held_is_saved_and_never_changed(mesh, tmp_path):
    """Held arrays have no moments; what stands beside the state is an item of its own."""
    text = "model: {vocab_size: 64, max_seq_length: 8, n_layers: 2, n_heads: 2, n_embd: 32}\n"
    text += "training: {max_steps: 5, global_batch_size: 4, learning_rate: 0.1, warmup_steps: 0}"
    config = config_from_text(text, "c.yaml")

    def is_trained(path):
        return ".mlp." not in path

    _, program = program_of(config, mesh, is_trained=is_trained)
    state = program.create()
    everything = program_of(config, mesh)[1].create()
    same(merge(state.params, state.held), everything.params)
    assert set(state.held["blocks"]) == {"mlp"}
    assert "mlp" not in state.params["blocks"]

    def count(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    assert count(state.opt_state) == 2 * count(state.params) + 1

    tokens = np.arange(32, dtype=np.int32).reshape(4, 8)
    batch = {"tokens": tokens, "targets": tokens + 1, "weights": np.ones((4, 8), np.float32)}
    batch["row_hash"] = np.zeros(4, np.uint32)
    batch = put_batch(batch, program.dims, rows=range(4), mesh=mesh, global_batch_size=4)
    batch |= {"stop": put_flag(False, mesh)}
    before = jax.device_get((state.params, state.held))
    state, _ = program.train_step(state, program.borrowed, batch)
    same(state.held, before[1])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, before[0])
    assert all(jax.tree.leaves(changed))

    beside = {"average": jax.tree.map(lambda x: x * 0.5, state.params)}
    state = dataclasses.replace(state, beside=beside)
    write(tmp_path / "saved", to_trees(state), {"config.yaml": "x"}, INFO)
    assert find_damage(tmp_path / "saved") is None
    assert sorted(path.name for path in (tmp_path / "saved" / "state").iterdir() if path.is_dir()) == [
        "average", "optimizer", "params",
    ]  # fmt: skip

    def placed(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    restored = restore_state(tmp_path / "saved", jax.tree.map(placed, state))
    same(restored, state)

    # A run that trains all of them reads the same files.
    whole = restore_params(tmp_path / "saved", program_of(config, mesh)[1].abstract.params)
    same(whole, merge(state.params, state.held))


def test_a_tree_in_two_parts_is_one_again():
    tree = {"a": {"b": jnp.ones(2), "c": jnp.zeros(3)}, "d": jnp.ones(1)}
    trained, held = partition(tree, lambda path: path != "a.c")
    assert set(held) == {"a"}
    assert set(trained) == {"a", "d"}
    same(merge(trained, held), tree)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    trees = {"params": {"a": jnp.arange(4.0)}}
    write(tmp_path / "one", trees, {}, INFO)
    assert read_info(tmp_path / "one") == INFO
    with pytest.raises(UserError, match="is in the way of a checkpoint"):
        write(tmp_path / "one", trees, {}, INFO)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("l1_jax.checkpoint.write.flush", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "two", trees, {}, INFO)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
