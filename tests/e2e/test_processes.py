"""Several processes, with simulated devices, run as one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICK_COMPILE, ROOT

pytestmark = pytest.mark.slow
STEPS = (
    "training.max_steps=20",
    "training.eval_steps=10",
    "training.logging_steps=1",
    "training.save_steps=10",
)
# At the config's 0.01 some gradients are ten times as large as the others, and rounding grows in them as much.
RATE = ("training.learning_rate=0.002",)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Job:
    """`count` processes of one command, on eight devices together."""

    def __init__(
        self,
        count,
        *args,
        devices=8,
        port=None,
        ids=None,
        extra=None,
        name="train",
        hosts=None,
        variables=False,
    ):
        flags = f"--xla_force_host_platform_device_count={devices // count} {QUICK_COMPILE}"
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        address = f"127.0.0.1:{port or free_port()}"
        self.processes = []
        for i in range(count) if ids is None else ids:
            joined = (
                ("--coordinator", address, "--num-processes", count, "--process-id", i)
                if count > 1
                else ()
            )
            if variables and joined:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                }
                joined = ()
            command = [
                sys.executable,
                ROOT / f"scripts/{name}.py",
                *args,
                *joined,
                *(extra or {}).get(i, ()),
            ]
            if hosts:  # a local disk for each
                (hosts / str(i)).mkdir(parents=True, exist_ok=True)
                env |= {"TMPDIR": str(hosts / str(i)), "L1_CACHE_DIR": str(hosts / f"cache-{i}")}
            home = hosts / str(i) if hosts else None
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(
                subprocess.Popen([*map(str, command)], env=env, cwd=home, **pipes)
            )

    def wait(self, timeout=300):
        """Exit codes; stdout and stderr of each are in `outputs`."""
        self.outputs = [process.communicate(timeout=timeout) for process in self.processes]
        return [process.returncode for process in self.processes]


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train_args(config, data, run_dir, *overrides):
    return (
        "--config",
        config,
        f"data.path={data}",
        f"training.output_dir={run_dir}",
        *STEPS,
        *RATE,
        *overrides,
    )


def check_same(run_dir, expected):
    """The same batches, and losses to 1e-5."""
    assert [row["step"] for row in rows(run_dir)] == [row["step"] for row in rows(expected)]
    for row, other in zip(rows(run_dir), rows(expected), strict=True):
        assert row.get("data/batch_hash") == other.get("data/batch_hash")
        for name in {"train/loss", "val/loss", "train/grad_norm"} & row.keys():
            assert row[name] == pytest.approx(other[name], rel=1e-5)


@pytest.fixture(scope="module")
def alone(tiny_config, prepared, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    assert Job(1, *train_args(tiny_config, prepared, run_dir)).wait() == [0]
    return run_dir


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_is_one(count, alone, tiny_config, prepared, tmp_path):
    mesh = (
        ("parallelism.fsdp=2", "parallelism.tensor=2") if count == 2 else ("parallelism.context=2",)
    )
    batch = "training.global_batch_size=8"
    job = Job(count, *train_args(tiny_config, prepared, tmp_path, *mesh, batch))
    assert job.wait() == [0] * count, job.outputs
    check_same(tmp_path, alone)
    assert all("step " not in err for _, err in job.outputs[1:])  # only one process speaks
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == count


def test_other_devices_and_processes_resume(alone, tiny_config, prepared, tmp_path):
    """8 -> 4 -> 1 -> 8 devices, on one, two, one and two processes."""
    legs = [
        (8, 1, 5, ()),
        (4, 2, 10, ("parallelism.fsdp=2",)),
        (1, 1, 15, ()),
        (8, 2, 20, ("parallelism.pipeline=2",)),
    ]
    for devices, count, last, mesh in legs:
        stop = (
            f"training.max_steps={last}",
            "training.schedule_steps=20",
            "training.global_batch_size=8",
        )
        job = Job(
            count,
            *train_args(tiny_config, prepared, tmp_path, *stop, *mesh),
            "--resume",
            devices=devices,
        )
        assert job.wait() == [0] * count, job.outputs
    trained = [row for row in rows(tmp_path) if "train/loss" in row]
    expected = [row for row in rows(alone) if "train/loss" in row]
    for row, other in zip(trained, expected, strict=True):
        assert row["data/batch_hash"] == other["data/batch_hash"]
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5)


def test_a_signal_to_one_stops_all_and_a_kill_ends_all(alone, tiny_config, prepared, tmp_path):
    """The stages of a pipeline share the rows of a batch, and still hear of a signal to one of them."""
    mesh = ("parallelism.pipeline=2", "training.global_batch_size=8", "training.save_steps=50")
    args = train_args(
        tiny_config,
        prepared,
        tmp_path,
        "training.max_steps=4000",
        "training.schedule_steps=20",
        *mesh,
    )
    job = Job(2, *args)
    while not (tmp_path / "checkpoint-50").exists():
        assert job.processes[0].poll() is None, job.wait()
        time.sleep(0.1)
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.outputs
    (last,) = {row["step"] for row in rows(tmp_path)[-1:]}
    job = Job(2, *args, "--resume")
    while rows(tmp_path)[-1]["step"] < last + 10:
        assert job.processes[0].poll() is None, job.wait()
        time.sleep(0.1)
    job.processes[1].kill()
    started = time.perf_counter()
    assert job.wait()[0] not in (0, 2, 75), job.outputs
    # Which it is depends on where the first one was: in an exchange, or waiting for jax's sign of life.
    assert (
        "another process of the job has ended" in job.outputs[0][1]
        or "Terminating process" in job.outputs[0][1]
    )
    assert time.perf_counter() - started < 60


def test_two_processes_evaluate_and_generate(trained, prepared, tmp_path):
    """Standard output is one JSON line from one process, the same as that of a process alone; so is
    a file of log-probabilities."""
    path = tmp_path / "log_probs.jsonl"
    file = ("--logprobs", path, "--overwrite")
    for name, args in (
        (
            "evaluate",
            (
                "--model",
                trained,
                "--data",
                prepared / "val.txt",
                "--json",
                *file,
                "--mesh",
                "fsdp=4",
            ),
        ),
        (
            "generate",
            (
                "--model",
                trained,
                "--prompt",
                "The",
                "--max-tokens",
                8,
                "--json",
                "--mesh",
                "tensor=2",
            ),
        ),
    ):
        results, log_probs = [], []
        for count, more in (
            (1, args),
            (2, args),
            (2, args[:-2]),
        ):  # at last on the mesh that is the default
            job = Job(count, *more, name=name, variables=True)
            assert job.wait() == [0] * count, job.outputs
            assert [out.count("\n") for out, _ in job.outputs] == [1, 0][:count]
            results.append(json.loads(job.outputs[0][0]))
            if name == "evaluate":
                values = [json.loads(line)["logprob"] for line in path.read_text().splitlines()]
                path.unlink()
                log_probs.append(values)
        for result in results[1:]:
            assert result == (
                pytest.approx(results[0], rel=1e-5) if name == "evaluate" else results[0]
            )
        for values in log_probs[1:]:
            assert values == pytest.approx(log_probs[0], rel=1e-4, abs=1e-4)


def test_processes_that_differ_are_refused(tiny_config, prepared, tmp_path):
    args = train_args(tiny_config, prepared, tmp_path / "run")
    job = Job(2, *args, extra={1: ("training.learning_rate=0.5",)})
    assert job.wait() == [2, 2], job.outputs
    message = "error: the processes differ in training.learning_rate: 0.002 in this one, 0.5 in process 1. Start"
    assert job.outputs[0][1].splitlines()[-1].startswith(message)
    assert not (tmp_path / "run").exists()
    job = Job(2, *args, extra={1: ("data.path=absent",)})
    assert job.wait() == [2, 2], job.outputs
    assert "process 1 stopped: absent is not a prepared directory" in job.outputs[0][1]


def test_directories_that_are_not_the_same_are_refused(tiny_config, prepared, tmp_path):
    args = (
        "--config",
        tiny_config,
        f"data.path={prepared}",
        "training.output_dir=run",
        *STEPS,
        *RATE,
    )
    job = Job(2, *args, hosts=tmp_path)
    assert job.wait() == [2, 2], job.outputs
    assert "training.output_dir run of this process is not that of process 0" in job.outputs[1][1]


@pytest.mark.parametrize("comes", [0, 1])
def test_a_process_that_never_comes(comes, tiny_config, prepared, tmp_path):
    """Neither a worker nor the coordinator."""
    args = (*train_args(tiny_config, prepared, tmp_path), "--join-timeout", 3)
    port = free_port()
    job = Job(2, *args, ids=[comes], port=port)
    assert job.wait(60) == [75]
    last = job.outputs[0][1].splitlines()[-1]
    assert last.startswith(f"error: not all processes joined at 127.0.0.1:{port} in 3 s. See that")


def test_processes_without_a_common_disk(tiny_config, prepared, tmp_path):
    """Each has a scratch directory of its own; they meet in a bucket. With a frozen layer and an average of the rest."""
    run, hosts = tmp_path / "bucket" / "run", tmp_path / "hosts"
    keys = (r"transfer.freeze=['blocks\.0\.']", "training.ema_decay=0.9")
    alone = tmp_path / "alone"
    assert Job(1, *train_args(tiny_config, prepared, alone, *keys)).wait() == [0]

    mesh = ("parallelism.fsdp=4", "parallelism.tensor=2", "training.global_batch_size=8")
    args = train_args(tiny_config, prepared.as_uri(), run.as_uri(), *mesh, *keys)
    job = Job(2, *args, hosts=hosts)
    assert job.wait() == [0, 0], job.outputs
    check_same(run, alone)
    assert {path.parent.name for path in run.glob("*/checkpoint.json")} == {
        "checkpoint-10",
        "checkpoint-20",
        "best_model-20",
    }
    shutil.rmtree(run / "checkpoint-20")
    shutil.rmtree(run / "best_model-20")  # as if killed before them
    (run / "best_model-20" / "state").mkdir(parents=True)
    (run / "best_model-20" / "state" / "half").write_text("")
    job = Job(2, *args, "--resume", hosts=hosts)
    assert job.wait() == [0, 0], job.outputs
    assert "steps 11 to 20" in job.outputs[0][1]
    check_same(run, alone)
    assert not (run / "best_model-20" / "state" / "half").exists()
    assert not list(hosts.glob("?/*"))
