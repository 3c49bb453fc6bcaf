"""Damage to checkpoints and data is found, named, and gone round; a save that fails harms nothing."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from e2e.test_run import train_args
from faults import corruption
from golden.make import logits

from l1_jax import checkpoint
from l1_jax import saver as saving
from l1_jax.checkpoint import CheckpointInfo
from l1_jax.errors import RunError, UserError
from l1_jax.integrity import verify
from l1_jax.run import directory
from l1_jax.saver import Saver
from l1_jax.storage import Remote
from l1_jax.training.state import Health, TrainState

GOLDEN = sorted(path.parent for path in Path(__file__).parent.glob("golden/*/logits.json"))
INFO = CheckpointInfo(global_batch_size=1, total_steps=9, documents="line", data_hash="", tokenizer_sha256="")
WHERE = ("state/params/final_norm.bias/0", "state/params/final_norm.bias/0 (sha256 does not match)")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of a run whose best model is of its last step, 100."""
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def state_of_size(count: int, step: int = 0) -> TrainState:
    """With `count` random numbers, which no compression makes smaller, twice."""
    numbers = jax.random.bits(jax.random.key(step), (count,))
    return TrainState(jax.numpy.int32(step), {"a": numbers}, {"a": numbers}, None, Health(*jax.numpy.zeros(4)))


def save(saver: Saver, step: int, count: int = 8) -> None:
    saver.save(state_of_size(count, step), dataclasses.replace(INFO, step=step), [f"checkpoint-{step}"])


def save_now(saver: Saver, step: int, count: int = 8) -> bool:
    save(saver, step, count)
    return saver.wait()


def test_the_manifest_has_every_file_and_the_twin_has_it_too(trained):
    for name in ("checkpoint-100", "best_model"):
        path = trained / name
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert json.loads((path / "manifest.json").read_text())["files"].keys() == files - {"manifest.json"}
        assert verify(path) is None


def test_all_damage_is_found_and_the_step_before_is_used(trained, tmp_path):
    assert [row for row in corruption.damage(trained, tmp_path, 30, 10, 5) if not row[3]] == []


def test_of_the_shares_exactly_one_finds_it(run):
    path = run / "checkpoint-100"
    for name in sorted(json.loads((path / "manifest.json").read_text())["files"])[::25]:
        (path / name).rename(path / "away")
        found = [verify(path, share=(i, 3)) for i in range(3)]
        assert sorted(map(str, found)) == sorted(["None", "None", f"{name} (missing)"])
        (path / "away").rename(path / name)


def test_only_what_is_read_is_looked_at(run):
    flip(next((run / "checkpoint-100" / "state/optimizer").rglob("0*")))
    assert verify(run / "checkpoint-100", ("params",)) is None
    assert "sha256 does not match" in verify(run / "checkpoint-100")


def test_links_that_leave_the_checkpoint_are_refused(run):
    path = run / "checkpoint-100" / WHERE[0]
    path.rename(run / "elsewhere")
    path.symlink_to(run / "elsewhere")
    assert verify(run / "checkpoint-100") == f"{WHERE[0]} (a link that leaves its directory)"
    whole = run.with_name("link")
    whole.symlink_to(run)  # the root may be a link
    assert verify(whole / "checkpoint-80") is None


@pytest.mark.slow
def test_a_run_goes_on_from_the_step_before(script, run, tiny_config, prepared):
    for name in ("checkpoint-100", "best_model"):
        flip(run / name / WHERE[0])
    flip(run / "checkpoint-80" / "checkpoint.json")
    args = train_args(tiny_config, prepared, run, "training.max_steps=62", "training.schedule_steps=100")
    result = script("train", "--resume", *args)
    assert result.code == 0, result.err
    for damage in (f"checkpoint-100 is damaged: {WHERE[1]}", f"best_model is damaged: {WHERE[1]}"):
        assert f"warning: {damage}; using checkpoint-60\n" in result.err
    assert "checkpoint-80 is damaged: checkpoint.json (sha256 does not match); using checkpoint-60\n" in result.err
    assert "steps 61 to 62" in result.err
    names = {path.name for path in run.iterdir() if path.is_dir()}
    aside = {"damaged-checkpoint-100.1", "damaged-checkpoint-80.1", "damaged-best_model.1"}
    assert names == {"checkpoint-60", "checkpoint-62", "best_model", "tensorboard"} | aside
    assert json.loads(script("verify", run, "--json").out)["damage"] == dict.fromkeys(
        ("best_model", "checkpoint-60", "checkpoint-62")
    )
    result = script("train", "--overwrite", *args, "training.max_steps=1")
    assert (result.code, aside <= {path.name for path in run.iterdir()}) == (0, True)


def test_where_all_are_damaged_no_run_begins(script, run, tiny_config, prepared):
    for path in [*run.glob("checkpoint-*"), run / "best_model"]:
        (path / "checkpoint.json").write_text("")
    before = sorted(run.rglob("*"))
    result = script("train", "--resume", *train_args(tiny_config, prepared, run, "training.max_steps=102"))
    assert (result.code, sorted(run.rglob("*"))) == (2, before)
    assert f"no checkpoint of {run} is good: best_model is damaged: checkpoint.json (truncated); " in result.error
    with pytest.raises(UserError, match=r"checkpoint-60 is damaged: checkpoint.json \(unreadable"):
        checkpoint.read_info(run / "checkpoint-60")


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
        assert (result.code, result.error) == (2, f"error: {run}/best_model is damaged: {WHERE[1]}. {others}")
    (run / "best_model" / "checkpoint.json").unlink()
    result = script("generate", "--model", run, "--prompt", "A")
    assert f"{run}/best_model is damaged: checkpoint.json (missing). {others}" in result.error


def test_a_checkpoint_under_the_name_of_another_step(run):
    shutil.rmtree(run / "best_model")
    (run / "checkpoint-100").rename(run / "checkpoint-120")
    assert directory.find_resumed(run, None) == (run / "checkpoint-80", [run / "checkpoint-120"])


@pytest.mark.parametrize("name", ["tokenizer.json", "tokens/train.bin", "tokens/val.bin", "manifest.json"])
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
    message = (
        f"error: {data} is damaged: {name} (sha256 does not match). Restore it from a copy, or run scripts/prepare"
    )
    assert result.error.startswith(message)


def test_evaluation_on_damaged_data(script, prepared, trained, tmp_path):
    data = shutil.copytree(prepared, tmp_path / "data")
    for name in ("tokens/test.bin", "test.txt"):
        flip(data / name)
        result = script("evaluate", "--model", trained, "--data", data)
        assert (result.code, f"{data} is damaged: {name} (sha256 does not match)" in result.error) == (2, True)


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
        damage = {"train": "train.txt (sha256 does not match)", "val": None, "test": None, "tokenizer": None}
        assert json.loads(result.out) == {"path": str(place), "damage": damage}
    result = script("verify", "memory://b/run")
    assert f"checkpoint-100: ok\ncheckpoint-60: damaged: config.yaml (missing)\ncheckpoint-80: damaged: {WHERE[1]}" in (
        result.out
    )
    result = script("verify", tmp_path)
    assert (result.code, "is neither a run with checkpoints, nor a checkpoint" in result.error) == (2, True)


@contextlib.contextmanager
def files_of_at_most(count: int):
    """EFBIG for every longer file: what a full disk does, but for the number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def disk_without_room(path: Path):
    """A disk with bytes, but with few inodes: it is full in the middle of a save."""
    free = os.statvfs(path)
    remount = ["mount", "-t", "tmpfs", "tmpfs", path, "-o"]
    subprocess.run([*remount, f"remount,nr_inodes={free.f_files - free.f_ffree + 16}"], check=True)
    yield
    subprocess.run([*remount, "remount,nr_inodes=1000"], check=True)


@contextlib.contextmanager
def read_only_disk(path: Path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "remount,ro", "tmpfs", path], check=True)
    yield
    subprocess.run(["mount", "-t", "tmpfs", "-o", "remount,rw", "tmpfs", path], check=True)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=1000", "tmpfs", path]).returncode
    ):
        pytest.skip("only root may mount a disk")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fails_once(run_dir: Path, fault, reason: str, count: int = 8) -> None:
    """With `stop` the save is an error, with `warn` the next one works; the older steps are good in each case."""
    for warn in (False, True):
        saver = Saver(run_dir, 2, {"config.yaml": "x"}, warn=warn)
        for step in (1, 2):
            save_now(saver, step)
        with fault():
            if warn:
                assert not save_now(saver, 3, count)
            else:
                with pytest.raises(RunError) as caught:
                    save_now(saver, 3, count)
                assert f"step 3 could not be saved in {run_dir} ({reason}): it needs " in str(caught.value)
                assert "MB are free. See that the disk" in str(caught.value)
        names = {path.name: verify(path) for path in run_dir.glob("*") if not path.name.startswith(".saving-3")}
        assert names == {"checkpoint-1": None, "checkpoint-2": None}
        if warn:
            assert save_now(saver, 4)
            assert {path.name: verify(path) for path in run_dir.glob("checkpoint-*")} == {
                "checkpoint-2": None, "checkpoint-4": None,
            }  # fmt: skip
        saver.close()
        for path in run_dir.iterdir():
            shutil.rmtree(path)


def test_a_file_that_may_not_be_so_long(tmp_path):
    fails_once(tmp_path, lambda: files_of_at_most(2**20), "File too large", 2**20)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room(disk, capfd):
    fails_once(disk, lambda: disk_without_room(disk), "No space left on device")
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_that_is_too_small(disk):
    fails_once(disk, contextlib.nullcontext, "No space left on device", 2**21)


def test_a_disk_that_is_read_only(disk):
    fails_once(disk, lambda: read_only_disk(disk), "Read-only file system")


def test_the_last_save_must_not_fail(tmp_path):
    saver = Saver(tmp_path, 2, {}, warn=True)
    with files_of_at_most(2**20):
        save(saver, 1, 2**20)
        with pytest.raises(RunError, match="File too large"):
            saver.close()


def test_a_save_that_fails_in_one_process_fails_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "exchange", lambda key, text, _: [text, '{"fault": "Disk quota exceeded"}'])
    saver = Saver(tmp_path, 2, {})
    with pytest.raises(RunError, match=r"step 1 could not be saved by process 1 \(Disk quota exceeded\)"):
        save(saver, 1)
    assert not list(tmp_path.iterdir())


def test_a_best_model_that_was_not_saved_is_none(script, prepared, tiny_config, tmp_path, monkeypatch):
    name, failed = Saver._name, []

    def fail_once(self, partial, names, digests):
        if names == ["best_model"] and self._info.step == 2 and not failed:
            failed.append(names)
            raise OSError(28, "No space left on device")
        return name(self, partial, names, digests)

    monkeypatch.setattr(Saver, "_name", fail_once)
    steps = ("training.max_steps=3", "training.eval_steps=1", "training.eval_batches=1", "training.save_steps=3")
    args = train_args(tiny_config, prepared, tmp_path / "run", *steps, "training.on_save_error=warn")
    result = script("train", *args)
    assert (result.code, failed) == (0, [["best_model"]])
    assert "warning: step 2 could not be saved" in result.err
    losses = {
        row["step"]: row["val/loss"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "val/loss" in row
    }
    assert losses[2] < losses[1]
    best = min((losses[1], 1), (losses[3], 3))  # of those that could be saved
    info = checkpoint.read_info(tmp_path / "run" / "checkpoint-3")
    assert (info.best_loss, info.best_step) == best
    assert checkpoint.read_info(tmp_path / "run" / "best_model").step == best[1]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_checkpoints_of_older_versions_give_the_same_logits(path):
    assert verify(path / "checkpoint") is None
    expected = np.array(json.loads((path / "logits.json").read_text()), np.float32)
    np.testing.assert_allclose(logits(path / "checkpoint")[0], expected, rtol=0, atol=1e-6)
