"""Damage to checkpoints and data is found, named, and gone round; a save that fails harms nothing."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from e2e.test_run import train_args
from faults import corruption, disk
from faults.disk import fails_once, save, save_now
from golden.make import logits

from l1_jax.checkpoint import saver as saving
from l1_jax.checkpoint.manifest import find_damage, read_info
from l1_jax.checkpoint.resuming import find_resumed
from l1_jax.checkpoint.run_directory import RunDirectory
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.errors import RunError, UserError
from l1_jax.parallel.mesh import create_mesh
from l1_jax.run.tracking import Board, Rows
from l1_jax.storage.remote import Remote
from l1_jax.training.initial import restore_state
from l1_jax.training.program import make_program

GOLDEN = sorted(path.parent for path in Path(__file__).parent.glob("golden/*/logits.json"))
WHERE = ("state/params/final_norm.bias/0", "state/params/final_norm.bias/0 (sha256 does not match)")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run whose best model is of its last step, 100."""
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_the_manifest_has_every_file_and_the_twin_has_it_too(trained):
    for name in ("checkpoint-100", "best_model"):
        path = trained / name
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert json.loads((path / "manifest.json").read_text())["files"].keys() == files - {
            "manifest.json"
        }
        assert find_damage(path) is None


@pytest.mark.slow
def test_all_damage_is_found_and_the_step_before_is_used(trained, tmp_path):
    assert [row for row in corruption.damage(trained, tmp_path, 30, 10, 5) if not row[3]] == []


def test_of_the_shares_exactly_one_finds_it(run):
    path = run / "checkpoint-100"
    for name in sorted(json.loads((path / "manifest.json").read_text())["files"])[::25]:
        (path / name).rename(path / "away")
        found = [find_damage(path, share=(i, 3)) for i in range(3)]
        assert sorted(map(str, found)) == sorted(["None", "None", f"{name} (missing)"])
        (path / "away").rename(path / name)


def test_only_what_is_read_is_looked_at(run):
    flip(next((run / "checkpoint-100" / "state/optimizer").rglob("0*")))
    assert find_damage(run / "checkpoint-100", ("params",)) is None
    assert "sha256 does not match" in find_damage(run / "checkpoint-100")


def test_links_that_leave_the_checkpoint_are_refused(run):
    path = run / "checkpoint-100" / WHERE[0]
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    assert find_damage(run / "checkpoint-100") == f"{WHERE[0]} (a link that leaves its directory)"
    whole = run.with_name("link")
    whole.symlink_to(run)  # the root may be a link
    assert find_damage(whole / "checkpoint-80") is None


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_before(script, run, tiny_config, prepared):
    for name in ("checkpoint-100", "best_model"):
        flip(run / name / WHERE[0])
    flip(run / "checkpoint-80" / "checkpoint.json")
    args = train_args(
        tiny_config, prepared, run, "training.max_steps=62", "training.schedule_steps=100"
    )
    result = script("train", "--resume", *args)
    assert result.code == 0, result.err
    for damage in (f"checkpoint-100 is damaged: {WHERE[1]}", f"best_model is damaged: {WHERE[1]}"):
        assert f"warning: {damage}; using checkpoint-60\n" in result.err
    assert (
        "checkpoint-80 is damaged: checkpoint.json (sha256 does not match); using checkpoint-60\n"
        in result.err
    )
    assert "steps 61 to 62" in result.err
    names = {path.name for path in run.iterdir() if path.is_dir()}
    aside = {"damaged-checkpoint-100.1", "damaged-checkpoint-80.1", "damaged-best_model.1"}
    assert names == {"checkpoint-60", "checkpoint-62", "best_model", "tensorboard"} | aside
    assert json.loads(script("verify", run, "--json").out)["damage"] == dict.fromkeys(
        ("best_model", "checkpoint-60", "checkpoint-62")
    )
    result = script("train", "--overwrite", *args, "training.max_steps=1")
    assert (result.code, aside <= {path.name for path in run.iterdir()}) == (0, True)


def test_the_best_model_is_looked_at_too(run, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    shutil.rmtree(run / "checkpoint-100")
    shutil.rmtree(run / "best_model")
    shutil.copytree(run / "checkpoint-60", run / "best_model")
    flip(run / "best_model" / WHERE[0])
    assert find_resumed(RunDirectory(run), None) == (run / "checkpoint-80", (run / "best_model",))
    assert f"best_model is damaged: {WHERE[1]}" in caplog.text


def test_where_only_the_last_checkpoint_is_damaged_it_is_saved_again(
    script, run, tiny_config, prepared
):
    """And so is the best model, of the same step."""
    args = train_args(tiny_config, prepared, run, "training.max_steps=100")
    for name in ("checkpoint-100", "best_model"):
        flip(run / name / WHERE[0])
        assert script("train", "--resume", *args).code == 0
        assert find_damage(run / name) is None
        assert (run / f"damaged-{name}.1").exists()
    assert "nothing left to do" in script("train", "--resume", *args).err


def test_what_a_run_writes_is_no_directory(script, run, tiny_config, prepared):
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    result = script("train", "--resume", *train_args(tiny_config, prepared, run))
    assert (result.code, f"{run}/config.yaml is a directory" in result.error) == (2, True)
    (run / "run.json").write_text("{")
    (run / "config.yaml").rmdir()
    result = script("train", "--resume", *train_args(tiny_config, prepared, run))
    assert (result.code, "or delete it: the account of the run's time" in result.error) == (2, True)


def test_damaged_rows_are_told_of(script, run, tiny_config, prepared):
    (run / "skipped.jsonl").write_text('{"step": 3}\nnonsense\n')
    result = script("train", "--resume", *train_args(tiny_config, prepared, run))
    assert (result.code, result.error) == (
        2,
        f"error: {run}/skipped.jsonl:2 is damaged. Delete the line.",
    )
    (run / "skipped.jsonl").write_bytes(b"\xff\n")
    result = script("train", "--resume", *train_args(tiny_config, prepared, run))
    assert (result.code, result.error) == (
        2,
        f"error: {run}/skipped.jsonl:1 is damaged. Delete the line.",
    )


def test_where_all_are_damaged_no_run_begins(script, run, tiny_config, prepared):
    for path in [*run.glob("checkpoint-*"), run / "best_model"]:
        (path / "checkpoint.json").write_text("")
    before = sorted(run.rglob("*"))
    result = script(
        "train", "--resume", *train_args(tiny_config, prepared, run, "training.max_steps=102")
    )
    assert (result.code, sorted(run.rglob("*"))) == (2, before)
    assert (
        f"no checkpoint of {run} is good: best_model is damaged: checkpoint.json (truncated); "
        in result.error
    )
    with pytest.raises(UserError, match=r"checkpoint-60 is damaged: checkpoint.json \(unreadable"):
        read_info(run / "checkpoint-60")


def test_a_damaged_checkpoint_that_was_asked_for(script, run, tiny_config, prepared, corpus):
    flip(run / "best_model" / WHERE[0])
    (run / "checkpoint-80" / "manifest.json").unlink()
    others = "Use another one; beside it are: checkpoint-100, checkpoint-60."
    for command in (
        ("generate", "--model", run, "--prompt", "A"),
        ("evaluate", "--model", run / "best_model.pt", "--data", corpus),
        ("train", "--resume", run / "best_model", *train_args(tiny_config, prepared, run)),
    ):
        result = script(*command)
        assert (result.code, result.error) == (
            2,
            f"error: {run}/best_model is damaged: {WHERE[1]}. {others}",
        )
    (run / "best_model" / "checkpoint.json").unlink()
    result = script("generate", "--model", run, "--prompt", "A")
    assert f"{run}/best_model is damaged: checkpoint.json (missing). {others}" in result.error


def test_a_checkpoint_under_the_name_of_another_step(run):
    shutil.rmtree(run / "best_model")
    (run / "checkpoint-100").rename(run / "checkpoint-120")
    assert find_resumed(RunDirectory(run), None) == (
        run / "checkpoint-80",
        (run / "checkpoint-120",),
    )


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokens/train.bin", "tokens/val.bin", "manifest.json"]
)
def test_prepared_data_that_is_not_what_it_was(script, name, prepared, tiny_config, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    if name == "manifest.json":
        manifest = json.loads((data / name).read_text())
        manifest["hash_chain"][1]["content"]["dedup"] = False
        (data / name).write_text(json.dumps(manifest))
    else:
        flip(data / name)
    result = script("train", *train_args(tiny_config, data, tmp_path / "run"))
    assert (result.code, (tmp_path / "run").exists()) == (2, False)
    message = f"error: {data} is damaged: {name} (sha256 does not match). Restore it from a copy, or run scripts/prepare"
    assert result.error.startswith(message)


def test_evaluation_on_damaged_data(script, prepared, trained, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    for name in ("tokens/test.bin", "test.txt"):
        flip(data / name)
        result = script("evaluate", "--model", trained, "--data", data)
        assert (
            result.code,
            f"{data} is damaged: {name} (sha256 does not match)" in result.error,
        ) == (2, True)


def test_verify(script, run, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("L1_CACHE_DIR", str(tmp_path / "cache"))
    (run / "checkpoint-120").mkdir()
    (run / "checkpoint-60" / "config.yaml").write_text("")
    result = script("verify", run)
    assert (result.code, result.out.splitlines()) == (1, [
        "best_model: ok", "checkpoint-100: ok", "checkpoint-120: damaged: manifest.json (missing)",
        "checkpoint-60: damaged: config.yaml (truncated)", "checkpoint-80: ok",
    ])  # fmt: skip
    assert (script("verify", run / "checkpoint-80").out) == "checkpoint-80: ok\n"
    data = shutil.copytree(prepared, tmp_path / "data")
    assert script("verify", data).out == "train: ok\nval: ok\ntest: ok\ntokenizer: ok\n"
    flip(data / "train.txt")
    fsspec.filesystem("memory").store.clear()
    Remote("memory://b/data").upload(data)
    Remote("memory://b/run").upload(run)
    flip(run / "checkpoint-80" / WHERE[0])
    Remote("memory://b/run/checkpoint-80").upload(run / "checkpoint-80")
    for place in (data, "memory://b/data"):
        result = script("verify", place, "--json")
        assert result.code == 1
        damage = {
            "train": "train.txt (sha256 does not match)",
            "val": None,
            "test": None,
            "tokenizer": None,
        }
        assert json.loads(result.out) == {"path": str(place), "damage": damage}
    result = script("verify", "memory://b/run")
    assert (
        f"checkpoint-100: ok\ncheckpoint-60: damaged: config.yaml (missing)\ncheckpoint-80: damaged: {WHERE[1]}"
        in (result.out)
    )
    result = script("verify", tmp_path)
    assert (result.code, "is neither a run with checkpoints, nor a checkpoint" in result.error) == (
        2,
        True,
    )


@contextlib.contextmanager
def files_of_at_most(count: int):
    """EFBIG for every longer file: what a full disk does, but for the number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_save_that_fails_is_quiet(tmp_path):
    code = f"""import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest
from faults.disk import Saver, save_now
from pathlib import Path
with Saver(Path({str(tmp_path)!r}), keep=2, texts={{}}, warn=True) as saver:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    assert not save_now(saver, 1, 1 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert save_now(saver, 2)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "step 1 could not be saved" in result.stderr


def test_a_file_that_may_not_be_so_long(tmp_path):
    assert all(fails_once(tmp_path, lambda: files_of_at_most(2**20), "File too large", 2**20))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only():
    rows = disk.campaign(full=False)
    if rows[0][3] is None:
        pytest.skip("only root may mount a disk")
    assert [row for row in rows if not row[3]] == []


def test_the_last_save_must_not_fail(tmp_path):
    saver = Saver(tmp_path, keep=2, texts={}, warn=True)
    with files_of_at_most(2**20):
        save(saver, 1, 2**20)
        with pytest.raises(RunError, match="File too large"):
            saver.close()


def test_a_disk_that_is_gone_is_told_of_like_a_full_one(tmp_path, monkeypatch):
    def gone(_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(saving.shutil, "disk_usage", gone)
    with pytest.raises(
        RunError,
        match=r"step 1 could not be saved in .* \(Stale file handle\): it needs at least 0.0 MB. See",
    ):
        save_now(Saver(tmp_path, keep=2, texts={}), 1)


def test_a_disk_that_is_full_at_the_start(script, tiny_config, prepared, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = script("train", *train_args(tiny_config, prepared, tmp_path / "run"))
    message = (
        f"error: {tmp_path}/run/config.yaml: No space left on device. Check the path and its disk."
    )
    assert (result.code, result.error, "Traceback" in result.err) == (1, message, False)


def test_a_last_save_that_does_not_begin_must_not_be_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))

    def run(error):
        with Saver(tmp_path, keep=2, texts={}, warn=True) as saver:
            assert not save_now(saver, 1)
            if error:
                raise error

    with pytest.raises(RunError, match="it needs"):
        run(None)
    with pytest.raises(ZeroDivisionError):  # it stays what ends the run
        run(ZeroDivisionError)


def test_the_checkpoint_to_go_back_to_is_kept(tmp_path):
    with Saver(tmp_path, keep=2, texts={}, keep_every=10) as saver:
        for step in (10, 11, 12, 13):
            save(saver, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-13",
    ]
    with Saver(tmp_path, keep=2, texts={}, keep_every=10) as saver:
        save(saver, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-13", "checkpoint-20"]


def test_rows_outlast_a_full_disk(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # stderr may be a file here
    rows, board = Rows(tmp_path / "rows", warn=True), Board(tmp_path / "board", 1)
    rows.add({"step": 1})
    with files_of_at_most(20):
        for step in (2, 3):
            rows.add({"step": step})
            board.add(step, {"loss": 1.0})
        with pytest.raises(
            RunError, match=r"rows could not be written \(File too large\). See that the disk"
        ):
            Rows(tmp_path / "rows", warn=False).add({"step": 4})
    rows.add({"step": 5})
    rows.close()
    board.close()
    assert caplog.text.count("rows could not be written (File too large); its rows are kept") == 1
    assert caplog.text.count("TensorBoard could not be written (File too large): left off") == 1
    found = (tmp_path / "rows").read_text()
    assert found == "".join(f'{{"step": {n}}}\n' for n in (1, 2, 3, 5))


def test_a_save_that_fails_in_one_process_fails_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(
        saving, "exchange", lambda key, text, _: [text, '{"fault": "Disk quota exceeded"}']
    )
    saver = Saver(tmp_path, keep=2, texts={})
    with pytest.raises(
        RunError, match=r"step 1 could not be saved by process 1 \(Disk quota exceeded\)"
    ):
        save(saver, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_there", [False, True])
def test_the_best_model_is_the_one_that_is_there(
    is_there, script, prepared, tiny_config, tmp_path, monkeypatch
):
    """After a save that failed before, or after, it had its name."""
    name, failed = Saver._name, []

    def fail_once(self, partial, names, digests):
        if names == ["best_model"] and self._info.step == 2 and not failed:
            failed.append(names)
            if is_there:
                name(self, partial, names, digests)
            raise OSError(28, "No space left on device")
        return name(self, partial, names, digests)

    monkeypatch.setattr(Saver, "_name", fail_once)
    steps = (
        "training.max_steps=3",
        "training.eval_steps=1",
        "training.eval_batches=1",
        "training.save_steps=3",
    )
    args = train_args(
        tiny_config, prepared, tmp_path / "run", *steps, "training.on_save_error=warn"
    )
    result = script("train", *args)
    assert (result.code, failed) == (0, [["best_model"]])
    assert "warning: step 2 could not be saved" in result.err
    losses = {
        row["step"]: row["val/loss"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "val/loss" in row
    }
    assert losses[2] < losses[1]
    best = min((losses[step], step) for step in ((1, 2, 3) if is_there else (1, 3)))
    info = read_info(tmp_path / "run" / "checkpoint-3")
    assert (info.best_loss, info.best_step) == best
    assert read_info(tmp_path / "run" / "best_model").step == best[1]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_checkpoints_of_older_versions_give_the_same_logits_and_can_be_resumed(path):
    assert find_damage(path / "checkpoint") is None
    config = load_config(path / "checkpoint" / "config.yaml")
    program = make_program(config, create_mesh(config.parallelism, jax.devices()[:1]))
    state = restore_state(path / "checkpoint", program.abstract)
    assert state.step == read_info(path / "checkpoint").step > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    expected = np.array(json.loads((path / "logits.json").read_text()), np.float32)
    np.testing.assert_allclose(logits(path / "checkpoint")[0], expected, rtol=0, atol=1e-6)
