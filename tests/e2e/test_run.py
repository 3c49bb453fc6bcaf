"""Whole runs: what is logged, what is left behind, and that a kill changes nothing."""

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from l1_jax.checkpoint.resuming import home_of
from l1_jax.config.schema import Config
from l1_jax.run.tracking import Tracker

ROOT = Path(__file__).parents[2]


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def state_of(checkpoint):
    """All arrays of a checkpoint, read without our code."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        return {
            name: reader.restore(checkpoint / "state" / name) for name in ("params", "optimizer")
        }


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logged(run_dir):
    """Everything that is a value of the run, not of the clock."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows(run_dir)]


def train_args(config, prepared, run_dir, *overrides):
    return [
        "--config",
        config,
        f"data.path={prepared}",
        f"training.output_dir={run_dir}",
        *overrides,
    ]


def test_what_a_run_leaves_behind(trained):
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml", "metrics.jsonl", "run.json", "tensorboard", "best_model",
        "checkpoint-60", "checkpoint-80", "checkpoint-100",
    }  # fmt: skip
    assert {path.name for path in (trained / "best_model").iterdir()} == {
        "state", "config.yaml", "tokenizer.json", "checkpoint.json", "manifest.json",
    }  # fmt: skip
    found = rows(trained)
    train_rows = [row for row in found if "train/loss" in row]
    assert [row["step"] for row in train_rows] == [1, *range(10, 101, 10)]
    assert train_rows[-1].keys() == {
        "step", "train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "perf/tokens_per_second",
        "data/batch_hash",
    }  # fmt: skip
    assert train_rows[-1]["train/tokens"] == 100 * 8 * 32
    assert train_rows[-1]["train/loss"] < train_rows[0]["train/loss"] - 1
    assert [row["step"] for row in found if "val/loss" in row] == [50, 100]
    last = found[-1]
    assert last["val/perplexity"] == pytest.approx(np.exp(last["val/loss"]))
    assert 0 < last["val/bits_per_byte"] < 8


def test_a_run_is_not_overwritten_unasked(script, trained, tiny_config, prepared):
    before = (trained / "metrics.jsonl").read_bytes()
    result = script("train", *train_args(tiny_config, prepared, trained))
    assert (result.code, (trained / "metrics.jsonl").read_bytes()) == (2, before)
    assert "holds a run already" in result.error


def test_a_finished_run_has_nothing_left_to_do(script, trained, tiny_config, prepared):
    result = script(
        "train", "--resume", *train_args(tiny_config, prepared, trained, "training.max_steps=100")
    )
    assert result.code == 0
    assert "nothing left to do" in result.err


def tree(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_a_run_that_was_renamed_is_still_itself(script, trained, tmp_path):
    """Its config.yaml says where it was; that place is gone, and nothing begins there."""
    shutil.copytree(trained, run := tmp_path / "new")
    for config in (run / "config.yaml", run / "checkpoint-80" / "config.yaml"):
        config.write_text(config.read_text().replace(str(trained), str(tmp_path / "old")))
        before = tree(run)
        result = script("train", "--config", config, "--resume")
        assert (result.code, "nothing left to do: the run ended at step 100" in result.err) == (
            0,
            True,
        ), result.err
        said = f"{config} lies in the run {run}, and its training.output_dir is {tmp_path / 'old'}: the run directory"
        assert said in result.err

    result = script("train", "--config", run / "config.yaml")
    assert (result.code, f"{run} holds a run already" in result.error) == (2, True)
    result = script("train", "--config", run / "config.yaml", "--overwrite")
    assert (
        result.code,
        "Set training.output_dir to the one that is to be replaced" in result.error,
    ) == (2, True)
    assert tree(run) == before
    assert not (tmp_path / "old").exists()
    result = script(
        "train", "--config", run / "config.yaml", "--resume", f"training.output_dir={trained}"
    )
    assert (result.code, "lies in the run" in result.err) == (0, False)


def test_which_run_a_config_means(tmp_path, monkeypatch):
    run, link, elsewhere = tmp_path / "run", tmp_path / "link", tmp_path / "elsewhere"
    for place in (run / "checkpoint-5", elsewhere):
        place.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    link.symlink_to(run)

    def home(config, output_dir, resume=True):
        return home_of(Path(config), str(output_dir), resume=resume, overwrite=False)

    assert home(run / "config.yaml", "old") == str(run)
    assert home(run / "config.yaml", "old", resume=False) == str(run)
    assert home(run / "mine.yaml", "old") == "old"
    assert home(elsewhere / "config.yaml", "old") == "old"  # a copy of it
    assert home(run / "config.yaml", link) == str(link)  # the same directory
    assert home(link / "config.yaml", run) == str(run)
    assert home(run / "config.yaml", run.as_uri()) == run.as_uri()
    assert home(run / "config.yaml", "gs://b/run") == "gs://b/run"  # fetched to be looked at
    (run / "checkpoint-5" / "checkpoint.json").write_text("{}")
    assert home(run / "config.yaml", "gs://b/run") == str(run)  # fetched whole
    assert home(run / "checkpoint-5" / "config.yaml", "old") == str(run)
    assert (
        home(run / "checkpoint-5" / "config.yaml", "old", resume=False) == "old"
    )  # a new run, set up alike
    monkeypatch.chdir(run)
    assert home("config.yaml", "run") == str(run)
    monkeypatch.chdir(run / "checkpoint-5")
    assert home("config.yaml", "run") == str(run)


def start(config, prepared, run_dir, *args):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        *train_args(config, prepared, run_dir, *args),
    ]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)


def as_users_run(devices):
    """The environment of a process without the tests' flags for the compiler, which hide what XLA's passes do."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def finish(name, *args, devices=1):
    """Runs a script to its end in a process of its own; what it printed."""
    command = map(str, (sys.executable, ROOT / "scripts" / f"{name}.py", *args))
    done = subprocess.run(list(command), env=as_users_run(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


ON_CPU = {  # what a user has: one device or two, with all of a batch, a part of it, of the layers, or of the heads
    "one": (1,),
    "accumulation": (2, "training.gradient_accumulation_steps=2"),
    "pipeline": (2, "parallelism.pipeline=2", "parallelism.data=1"),
    "tensor": (2, "parallelism.tensor=2", "parallelism.data=1"),
}


@pytest.fixture(scope="module")
def run_on_cpu(tiny_config, prepared, tmp_path_factory):
    """Each run of `ON_CPU` in a precision, done once; the directory that has them."""

    @functools.cache
    def run(precision):
        home = tmp_path_factory.mktemp(precision)
        keys = (
            f"training.precision={precision}",
            "training.global_batch_size=4",
            "training.batch_size=4",
        )
        keys += ("training.max_steps=4", "training.save_steps=2", "training.logging_steps=1")
        keys += ("training.eval_batches=null", "model.dropout=0")

        def train(name):
            devices, *mesh = ON_CPU[name]
            return finish(
                "train",
                *train_args(tiny_config, prepared, home / name, *keys, *mesh),
                devices=devices,
            )

        with ThreadPoolExecutor(2) as pool:
            said = dict(zip(ON_CPU, pool.map(train, ON_CPU), strict=True))
        assert ("slower than float32 on a CPU" in said["one"].stderr) == (precision != "float32")
        return home

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "near"), [("float32", 1e-5), ("bfloat16", 2e-3), ("float16", 5e-4)]
)
def test_each_precision_runs_on_a_cpu(run_on_cpu, precision, near):
    """The loss is float32's to the precision's rounding, on one device and on two in each way."""
    exact = rows(run_on_cpu("float32") / "one")
    for name in ON_CPU:
        found = rows(run_on_cpu(precision) / name)
        assert [row["step"] for row in found] == [row["step"] for row in exact]
        for ours, theirs in zip(found, exact, strict=True):
            key = "val/loss" if "val/loss" in theirs else "train/loss"
            assert ours[key] == pytest.approx(theirs[key], rel=near), name


@pytest.mark.slow
def test_a_bfloat16_run_is_used_on_a_cpu(run_on_cpu, prepared):
    """It goes on bit for bit; evaluate.py gives the run's own validation loss; generate.py has a text."""
    run_dir = run_on_cpu("bfloat16") / "one"
    finish("train", "--config", run_dir / "config.yaml", "--resume", run_dir / "checkpoint-2")
    assert_identical(state_of(run_dir / "checkpoint-4"), state_of(run_dir / "aside-checkpoint-4.1"))
    evaluated = finish("evaluate", "--model", run_dir, "--data", prepared / "val.txt", "--json")
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(
        rows(run_dir)[-1]["val/loss"], rel=1e-3
    )
    generated = finish(
        "generate", "--model", run_dir, "--prompt", "The", "--max-tokens", 5, "--json"
    )
    assert json.loads(generated.stdout)["completions"][0]["tokens"] == 5


def wait_for_step(run_dir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run_dir / "metrics.jsonl").exists() and any(
            row["step"] >= step for row in rows_so_far(run_dir)
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} not reached: {process.communicate()[1]}")


def rows_so_far(run_dir):
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # being written
            return


@pytest.mark.slow
def test_kill_and_resume_is_bit_identical(script, tiny_config, prepared, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    steps = "training.max_steps=200"
    assert script("train", *train_args(tiny_config, prepared, undisturbed, steps)).code == 0

    process = start(tiny_config, prepared, killed, steps)
    wait_for_step(killed, 110, process)
    process.kill()
    process.wait()
    at_kill = max(row["step"] for row in rows_so_far(killed))
    assert 110 <= at_kill < 200

    assert script("train", "--resume", *train_args(tiny_config, prepared, killed, steps)).code == 0
    assert logged(killed) == logged(undisturbed)
    for name in ("checkpoint-200", "best_model"):
        assert_identical(state_of(killed / name), state_of(undisturbed / name))
    assert not [path for path in killed.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_other_devices_same_run(script, tiny_config, prepared, trained, tmp_path):
    """Eight devices for 60 steps, then the rest on another mesh: same batches, same loss to rounding."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    result = script(
        "train", "--resume", run_dir / "checkpoint-60",
        *train_args(tiny_config, prepared, run_dir, "training.max_steps=100"),
        "parallelism.fsdp=2", "parallelism.tensor=2",
    )  # fmt: skip
    assert result.code == 0
    assert {p.name for p in run_dir.glob("*checkpoint-*")} == {
        "checkpoint-60", "checkpoint-80", "checkpoint-100", "aside-checkpoint-80.1", "aside-checkpoint-100.1",
    }  # fmt: skip
    assert (run_dir / "aside-best_model.1").is_dir()  # of step 100, and this run makes its own
    assert "global_batch_size: 8" in (run_dir / "config.yaml").read_text()
    for ours, theirs in zip(logged(run_dir), logged(trained), strict=True):
        assert ours.get("data/batch_hash") == theirs.get("data/batch_hash")
        for name, value in theirs.items():
            if name in ("train/loss", "val/loss"):
                assert ours[name] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_8_to_4_to_1_to_8_devices(script, tiny_config, prepared, tmp_path, monkeypatch):
    """Each leg's next step is that of an undisturbed run to 1e-6, and still after 100 steps to 1e-5."""

    def run(run_dir, devices, last, *mesh):
        monkeypatch.setattr("l1_jax.run.start.select_devices", lambda _: jax.devices()[:devices])
        steps = (
            f"training.max_steps={last}",
            "training.schedule_steps=140",
            "training.eval_steps=200",
        )
        more = (
            "training.logging_steps=1",
            "training.save_steps=500",
            "training.learning_rate=0.001",
        )
        result = script(
            "train", "--resume", *train_args(tiny_config, prepared, run_dir, *steps, *more, *mesh)
        )
        assert result.code == 0, result.err

    run(tmp_path / "undisturbed", 8, 140)
    for devices, last, *mesh in (
        (8, 10), (4, 20, "parallelism.fsdp=2"), (1, 30), (8, 140, "parallelism.tensor=2", "parallelism.context=2"),
    ):  # fmt: skip
        run(tmp_path / "moved", devices, last, *mesh)
    trained = [
        [row for row in rows(tmp_path / name) if "train/loss" in row]
        for name in ("moved", "undisturbed")
    ]
    for ours, theirs in zip(*trained, strict=True):
        assert ours["data/batch_hash"] == theirs["data/batch_hash"]
        near = 1e-6 if ours["step"] in (11, 21, 31) else 1e-5
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=near), ours["step"]


def test_resume_without_a_checkpoint_starts_at_step_0(script, tiny_config, prepared, tmp_path):
    result = script(
        "train", *train_args(tiny_config, prepared, tmp_path, "training.max_steps=3"), "--resume"
    )
    assert result.code == 0
    assert "starting at step 0" in result.err
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_embd=64", "other values of model.n_embd, model.n_inner"),
        ("training.seed=1", "another value of training.seed: 42 there, 1 now"),
        ("data.document_mask=true", "another value of data.document_mask"),
    ],
)
def test_another_run_is_not_resumed(script, trained, tiny_config, prepared, override, message):
    result = script(
        "train",
        "--resume",
        *train_args(tiny_config, prepared, trained, "training.max_steps=200", override),
    )
    assert result.code == 2
    assert message in result.error


@pytest.mark.slow
def test_early_stopping_and_overwrite(script, tiny_config, prepared, tmp_path):
    """A learning rate that changes nothing: the first validation stays the best."""
    args = train_args(
        tiny_config, prepared, tmp_path, "training.max_steps=60", "training.eval_steps=5", "training.eval_batches=1",
        "training.learning_rate=1e-30", "training.early_stopping_patience=2",
    )  # fmt: skip
    assert "stopped early: 2 validations without a better loss" in script("train", *args).err
    assert [row["step"] for row in rows(tmp_path) if "val/loss" in row] == [5, 10, 15]
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == [1, 10, 15]
    assert rows(tmp_path)[-2].keys() == rows(tmp_path)[0].keys()
    assert json.loads((tmp_path / "best_model" / "checkpoint.json").read_text())["step"] == 5
    assert (tmp_path / "checkpoint-15").is_dir()
    before = rows(tmp_path)
    assert "nothing left to do" in script("train", "--resume", *args).err
    assert rows(tmp_path) == before

    (tmp_path / "mine.txt").write_text("not the run's")
    result = script(
        "train", "--overwrite", *train_args(tiny_config, prepared, tmp_path, "training.max_steps=2")
    )
    assert result.code == 0
    assert max(row["step"] for row in rows(tmp_path)) == 2
    assert not (tmp_path / "checkpoint-15").exists()
    assert (tmp_path / "mine.txt").exists()


def test_a_loss_that_is_not_finite_ends_the_run(script, tiny_config, prepared, tmp_path):
    overrides = (
        "training.max_steps=20",
        "training.learning_rate=1e18",
        "training.warmup_steps=0",
        "training.max_grad_norm=null",
    )
    result = script("train", *train_args(tiny_config, prepared, tmp_path, *overrides))
    assert result.code == 1
    assert result.error.startswith("error: the loss or gradient of step ")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_tensorboard_holds_the_rows(trained):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    events = event_accumulator.EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    expected = {row["step"]: row["train/loss"] for row in rows(trained) if "train/loss" in row}
    assert {e.step: e.value for e in events.Scalars("train/loss")} == pytest.approx(expected)


@pytest.mark.slow
def test_wandb_gets_the_rows_offline(script, tiny_config, prepared, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    keys = ("training.max_steps=2", "training.wandb_project=mine", "training.wandb_run_name=first")
    result = script("train", *train_args(tiny_config, prepared, tmp_path, *keys))
    assert result.code == 0, result.err
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for expected in (b"mine", b"first", b"val/bits_per_byte", b"train/loss", b"max_seq_length"):
        assert expected in content


def test_wandb_keeps_the_rows_of_a_run_that_went_back(tmp_path, monkeypatch):
    """W&B, which has seen step 99, drops a row that is said to be of step 61."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    init = wandb.init

    def resume(**options):
        run = init(**options)
        run.log({"train/loss": 99.123456}, step=99, commit=True)
        return run

    monkeypatch.setattr(wandb, "init", resume)
    with Tracker(
        tmp_path, Config().replace("training", wandb_project="mine"), step=60, run_id="abc"
    ) as tracker:
        for step in (61, 70, 110):
            tracker.log(step, {"train/loss": step + 0.123456})
        tracker.log(110, {"val/loss": 7.123456})
    wandb.teardown()  # its own process writes the file, and may have it still to do
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    for value in (b"99.123456", b"61.123456", b"70.123456", b"110.123456", b"7.123456"):
        assert value in content  # the console, which W&B stores too, shows four digits
    axis = wandb_internal_pb2.MetricRecord(glob_name="*", step_metric="step").SerializeToString()
    assert axis in content


def test_wandb_that_lets_nobody_in_is_said_at_once(
    script, tiny_config, prepared, tmp_path, monkeypatch
):
    pytest.importorskip("wandb").teardown()  # it keeps what it read of the environment
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))  # no .netrc
    named = script(
        "train",
        *train_args(tiny_config, prepared, tmp_path / "run", "training.wandb_project=my/l1"),
    )
    assert "W&B says: Invalid project name" in named.error
    result = script(
        "train", *train_args(tiny_config, prepared, tmp_path / "run", "training.wandb_project=mine")
    )
    assert result.code == 2
    assert "Run `wandb login`, set WANDB_MODE=offline" in result.error
    assert not (tmp_path / "run").exists()


def test_too_little_memory_is_one_line(script, tiny_config, prepared, tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"
        )

    monkeypatch.setattr("l1_jax.run.train.set_up", exhausted)
    result = script("train", *train_args(tiny_config, prepared, tmp_path / "run"))
    assert result.code == 1
    assert (
        "too little memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.). Lower"
        in result.error
    )


SHORTAGES = [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
    jax.errors.JaxRuntimeError(
        "INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."
    ),
    MemoryError("Unable to allocate 9.00 GiB for an array with shape (9,) and data type int64"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=str)
@pytest.mark.parametrize(
    ("name", "breaks", "args", "lower"),
    [
        ("train", "l1_jax.run.train.look_around", ("--config",), "training.batch_size"),
        ("evaluate", "l1_jax.evaluation.text.evaluate", ("--data", "x", "--model"), "--batch-size"),
        ("generate", "l1_jax.loading.load_model", ("--prompt", "A", "--model"), "--num-samples"),
        ("prepare_data", "l1_jax.data.prepare.prepare", ("--input",), "--input"),
        ("verify", "l1_jax.checkpoint.verify.verify_path", (), "a machine with more memory"),
    ],
)
def test_too_little_memory_is_one_line_in_each_command(
    script, monkeypatch, tmp_path, error, name, breaks, args, lower
):
    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(breaks, exhausted)
    config = tmp_path / "config.yaml"
    config.write_text("")
    result = script(name, *args, config)
    assert result.code == 1
    (line,) = result.err.strip().splitlines()
    assert "has too little memory" in line
    assert lower in line


@pytest.mark.slow
def test_too_many_samples_for_the_memory(trained):
    """In truth, in a process that may have a part of this machine's memory."""

    command = ["bash", "-c", 'ulimit -v 6291456 && exec "$@"', "limited"]
    command += [
        sys.executable,
        ROOT / "scripts" / "generate.py",
        "--model",
        trained,
        "--prompt",
        "A",
    ]
    command += ["--num-samples", 400_000, "--device", "cpu"]
    done = subprocess.run(
        list(map(str, command)), env=as_users_run(1), capture_output=True, text=True
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "has too little memory" in done.stderr
    assert done.stderr.strip().endswith("Lower --num-samples or --max-tokens.")


def test_wandb_that_is_not_installed_is_said_at_once(
    script, tiny_config, prepared, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = script(
        "train", *train_args(tiny_config, prepared, tmp_path / "run", "training.wandb_project=mine")
    )
    assert result.code == 2
    assert 'pip install -e ".[wandb]"' in result.error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_save_under_way_is_finished_when_the_run_fails(
    script, tiny_config, prepared, tmp_path, monkeypatch
):
    """A loss that is not finite right after a slow save."""
    from l1_jax.checkpoint import saver
    from l1_jax.run import loop

    flush, accept = saver.flush, loop.accept

    def slow_flush(path):
        time.sleep(1)
        flush(path)

    def failing_accept(run, tracker, clock, meter, step, metrics):
        if step == 3:
            metrics = metrics | {"finite": np.array(False)}
        accept(run, tracker, clock, meter, step, metrics)

    monkeypatch.setattr(saver, "flush", slow_flush)
    monkeypatch.setattr(loop, "accept", failing_accept)
    keys = ("training.max_steps=5", "training.save_steps=2")
    assert script("train", *train_args(tiny_config, prepared, tmp_path, *keys)).code == 1
    assert (tmp_path / "checkpoint-2" / "checkpoint.json").is_file()
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.slow
def test_resume_takes_a_best_model_that_is_newer_than_the_checkpoints(
    script, tiny_config, prepared, tmp_path
):
    keys = ("training.eval_steps=3", "training.eval_batches=1", "training.schedule_steps=8")
    first = script(
        "train", *train_args(tiny_config, prepared, tmp_path, *keys, "training.max_steps=3")
    )
    assert first.code == 0
    shutil.rmtree(
        tmp_path / "checkpoint-3"
    )  # as if killed between validation and the next checkpoint
    resumed = script(
        "train",
        "--resume",
        *train_args(tiny_config, prepared, tmp_path, *keys, "training.max_steps=8"),
    )
    assert "steps 4 to 8" in resumed.err
    assert not list(tmp_path.glob("aside-*"))


@pytest.mark.slow
def test_after_a_rewind_the_best_is_one_that_exists(
    script, trained, tiny_config, prepared, tmp_path
):
    shutil.copytree(trained, tmp_path / "run")
    args = train_args(
        tiny_config,
        prepared,
        tmp_path / "run",
        "training.max_steps=75",
        "training.schedule_steps=100",
    )
    shutil.rmtree(tmp_path / "run" / "best_model")
    assert script("train", "--resume", tmp_path / "run" / "checkpoint-60", *args).code == 0
    info = json.loads((tmp_path / "run" / "checkpoint-75" / "checkpoint.json").read_text())
    assert info["best_step"] == 75
    assert (
        json.loads((tmp_path / "run" / "best_model" / "checkpoint.json").read_text())["step"] == 75
    )


@pytest.mark.slow
def test_overwrite_spares_what_no_run_wrote(script, tiny_config, prepared, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "config.yaml").write_text("mine")
    result = script(
        "train", "--overwrite", *train_args(tiny_config, prepared, tmp_path, "training.max_steps=1")
    )
    assert result.code == 2
    assert "which no run wrote" in result.error
    result = script(
        "train", "--resume", *train_args(tiny_config, prepared, tmp_path, "training.max_steps=1")
    )
    assert "which no run wrote" in result.error
    assert (tmp_path / "config.yaml").read_text() == "mine"
    (tmp_path / "config.yaml").rename(tmp_path / "checkpoint-1000.pt")
    for name in ("best_model", "aside-mine", ".old-mine", "checkpoint-notes"):
        (tmp_path / name).mkdir()
    args = train_args(tiny_config, prepared, tmp_path, "training.max_steps=1")
    assert "which no run wrote" in script("train", *args).error
    (tmp_path / "best_model").rmdir()
    (tmp_path / "wandb").rmdir()
    (tmp_path / "wandb").symlink_to(tmp_path / "elsewhere")
    mine = sorted(tmp_path.iterdir())
    assert script("train", *args).code == 0
    first = (tmp_path / "run.json").read_text()
    assert script("train", "--overwrite", *args).code == 0
    assert (tmp_path / "run.json").read_text() != first
    assert set(mine) < set(tmp_path.iterdir())


def test_a_run_past_its_schedule_is_warned_of(script, tiny_config, prepared, tmp_path):
    keys = ("training.max_steps=4", "training.schedule_steps=2", "training.eval_batches=1")
    result = script("train", *train_args(tiny_config, prepared, tmp_path, *keys))
    assert "past training.schedule_steps 2 the learning rate stays at its floor" in result.err


def test_float16_that_always_overflows_ends_the_run(script, tiny_config, prepared, tmp_path):
    keys = (
        "training.max_steps=40",
        "training.fp16=true",
        "model.initializer_range=3000",
        "training.eval_steps=100",
    )
    result = script("train", *train_args(tiny_config, prepared, tmp_path, *keys))
    assert result.code == 1
    assert "is not finite" in result.error
