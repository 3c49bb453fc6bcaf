"""Under a real Slurm: two tasks train together, one is killed, the job requeues and ends as if nothing had been."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import QUICK_COMPILE, ROOT
from test_processes import Job, rows, train_args

pytestmark = pytest.mark.slow


def slurm(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)


def task(run_dir: Path, number: int) -> int | None:
    """The process of a task of the job."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_train = b"/python" in command[0] and f"training.output_dir={run_dir}".encode() in command
        if is_train and f"SLURM_PROCID={number}".encode() in variables:
            return int(path.name)
    return None


def arrays(run_dir: Path) -> list[np.ndarray]:
    import jax

    def read(reader: ocp.Checkpointer, path: Path):
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(path).item_metadata.tree,
        )
        return reader.restore(path, restore_args=as_numpy)

    path = (run_dir / "checkpoint-60" / "state").absolute()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        return jax.tree.leaves([read(reader, path / item) for item in ("params", "optimizer")])


@pytest.fixture
def submit(tmp_path):
    """Submits launch/slurm.sh with two tasks of four devices; returns the job's number and its log."""
    if not shutil.which("sbatch") or "idle" not in slurm("sinfo", "-h", "-o", "%T").stdout:
        pytest.skip("no idle Slurm here")
    numbers, log = [], tmp_path / "job.log"
    flags = f"--xla_force_host_platform_device_count=4 {QUICK_COMPILE}"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHON": sys.executable,
    }

    def start(*args):
        command = [
            "sbatch",
            "--parsable",
            "--ntasks=2",
            f"--output={log}",
            ROOT / "launch" / "slurm.sh",
            *args,
        ]
        job = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert job.returncode == 0, job.stderr
        numbers.append(job.stdout.strip())
        return numbers[-1], log

    yield start
    for number in numbers:
        slurm("scancel", number)


def wait_for(what, log, seconds=180):
    end = time.perf_counter() + seconds
    while not (found := what()):
        assert time.perf_counter() < end, (
            log.read_text() if log.exists() else "no log",
            slurm("squeue").stdout,
        )
        time.sleep(0.05)
    return found


def test_a_killed_task_is_requeued_and_the_run_ends_the_same(
    submit, tiny_config, prepared, tmp_path
):
    more = (
        "training.max_steps=60",
        "training.save_steps=20",
        "training.eval_steps=60",
        "parallelism.fsdp=2",
    )
    run_dir = tmp_path / "run"
    number, log = submit(*train_args(tiny_config, prepared, run_dir, *more))
    second = wait_for(lambda: task(run_dir, 1), log)
    wait_for(lambda: (run_dir / "checkpoint-20").exists(), log)
    os.kill(second, 9)
    wait_for(
        lambda: slurm("squeue", "-h", "-j", number, "-o", "%T").stdout.strip() == "PENDING", log
    )
    assert rows(run_dir)[-1]["step"] < 60
    # Slurm holds a requeued job for two minutes. A test need not wait so long, but until the first start is gone.
    time.sleep(5)
    wait_for(
        lambda: slurm("scontrol", "update", f"JobId={number}", "StartTime=now").returncode == 0, log
    )
    wait_for(lambda: (run_dir / "checkpoint-60").exists(), log)
    assert Job(2, *train_args(tiny_config, prepared, tmp_path / "undisturbed", *more)).wait() == [
        0,
        0,
    ]
    wait_for(lambda: not slurm("squeue", "-h", "-j", number).stdout.strip(), log)
    assert "to be resumed in a new start" in log.read_text()
    for ours, undisturbed in zip(arrays(run_dir), arrays(tmp_path / "undisturbed"), strict=True):
        np.testing.assert_array_equal(ours, undisturbed)


def test_wrong_input_is_not_requeued(submit, tiny_config, prepared, tmp_path):
    number, log = submit(*train_args(tiny_config, prepared, tmp_path / "run", "model.n_heads=5"))
    wait_for(lambda: "JobState=FAILED" in slurm("scontrol", "show", "job", number).stdout, log)
    assert "ExitCode=2:0" in slurm("scontrol", "show", "job", number).stdout
    assert "is not divisible by model.n_heads 5" in log.read_text()
    assert "new start" not in log.read_text()
