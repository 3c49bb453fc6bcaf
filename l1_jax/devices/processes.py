"""Several processes that run one program, each with its own devices.

How they find one another, and agree.
"""

import contextlib
import importlib.util
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from l1_jax import console
from l1_jax.errors import BusyError, RunError, UserError

# A process without a sign of life for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30
# How long a process that is done waits for the others.
SHUTDOWN_SECONDS = 120

_VARIABLES = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
_GPUS = "CUDA_VISIBLE_DEVICES"

# Where the first worker of a TPU pod listens.
_TPU_PORT = 8482
# The last ports, as jax's own SlurmCluster has it.
_FIRST_SLURM_PORT = 61440
_SLURM_PORTS = 4096

# How much longer than we jax waits, so that our message comes first.
_JOIN_MARGIN_SECONDS = 20
# How long process 0 lets those that failed alike go by themselves.
_LEAVE_SECONDS = 1.0


class _Job(NamedTuple):
    """Where the processes of a job meet, and what jax is told of it beside what it finds out."""

    address: str
    options: dict[str, Any]


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int = 120
) -> None:
    """Joins the other processes of the job, if there are any; to be called before jax is used.

    Without arguments they are found by what Slurm (srun), a TPU pod, or the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; with none of these the
    process is alone.

    Where not all come in time, this process ends with a message and code 75.

    Args:
        coordinator: HOST:PORT where process 0 listens.
        num_processes: of the job.
        process_id: of this one, from 0.
        timeout: in seconds.

    Raises:
        UserError: the arguments do not fit together, or the processes cannot join.
    """
    job = _find_job(coordinator, num_processes, process_id, timeout)
    if job is None or not _join(job, timeout):
        return

    # What libraries print of their connections is no result.
    results = os.dup(1)
    os.dup2(2, 1)
    # Open to the end.
    sys.stdout = open(results, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115

    console.leave = leave


def _find_job(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> _Job | None:
    """The job that the arguments name, or else the environment; None where the process is alone."""
    given: list[Any] = [coordinator, num_processes, process_id]
    names = ["`coordinator`", "`num_processes`", "`process_id`"]

    is_any_given = given != [None] * 3
    if not is_any_given and any(os.environ.get(name) for name in _VARIABLES):
        given = [os.environ.get(name) for name in _VARIABLES]
        names = _VARIABLES

    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if timeout < 1:
        raise UserError(f"`join_timeout` is {timeout}", "Give the seconds to wait, at least 1")
    if 0 < len(missing) < 3:
        are = "are" if len(missing) > 1 else "is"
        what = f"{' and '.join(missing)} {are} missing"
        raise UserError(what, f"Give all of {', '.join(names)}, or none")

    if not missing:
        return _named_job([str(value) for value in given], names)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm_job()
    if _is_on_tpu():
        return _tpu_job()
    return None


def _named_job(given: list[str], names: list[str]) -> _Job:
    """The job of an address, a number of processes and the number of one, called `names`."""
    address, count, number = given

    are_whole = count.isdecimal() and number.isdecimal()
    if not are_whole or int(number) >= int(count):
        what = f"{names[1]} is {count} and {names[2]} {number}"
        raise UserError(what, "Give whole numbers, the processes counted from 0")

    port = address.rpartition(":")[2]
    if not port.isdecimal():
        raise UserError(f"{names[0]} {address} has no port", "Give HOST:PORT, the same to all")

    options = {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(number),
        "cluster_detection_method": "deactivate",
    }
    return _Job(address, options)


def _slurm_job() -> _Job:
    address = slurm_address(os.environ)
    options: dict[str, Any] = {"coordinator_address": address}

    # A task that is alone on its node, or sees at most one GPU, uses all that it sees. Else jax
    # gives the i-th GPU to the i-th task.
    num_tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "0"))
    has_own_gpu = "," not in os.environ.get(_GPUS, ",")
    if num_tasks == num_nodes or has_own_gpu:
        options["local_device_ids"] = []

    return _Job(address, options)


def _is_on_tpu() -> bool:
    if not importlib.util.find_spec("libtpu"):
        return False
    return Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()


def _tpu_job() -> _Job:
    """jax finds out all of it; the address is for messages."""
    slices = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS")
    workers = slices or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not workers:
        return _Job(f"port {_TPU_PORT} of the first worker of the TPU", {})

    first = re.split("[:,]", workers)[0]
    return _Job(f"{first}:{_TPU_PORT}", {})


def _join(job: _Job, timeout: int) -> bool:
    """Waits for the other processes; False where jax knows better, and there are none."""

    def give_up() -> None:
        # jax itself would abort without a word that helps.
        what = f"not all processes joined at {job.address} in {timeout} s"
        remedy = (
            "See that every process was started, each with its own number, and that all "
            "reach this host and port"
        )
        print(f"error: {what}. {remedy}.", file=sys.stderr, flush=True)
        os._exit(BusyError.exit_code)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()

    # It would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)

    limits: Any = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
        "initialization_timeout": timeout + _JOIN_MARGIN_SECONDS,
    }
    try:
        jax.distributed.initialize(**job.options, **limits)
    except (RuntimeError, ValueError) as error:
        # There is no TPU.
        if not job.options and "coordinator_address should be defined" in str(error):
            return False

        reason = str(error).splitlines()[0].rstrip(".")
        what = f"the processes cannot join at {job.address}: {reason}"
        remedy = "Choose a free port, and start every process with the same address"
        raise UserError(what, remedy) from error
    finally:
        timer.cancel()

    return True


def slurm_address(variables: Mapping[str, str]) -> str:
    """Where the tasks of a job step meet.

    Its first node, at a port that follows from the job's number.

    Args:
        variables: of the environment.
    """
    # a,b or a[01-04,07]
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", variables["SLURM_STEP_NODELIST"])
    assert first
    node = f"{first[1]}{first[2] or ''}"

    port = _FIRST_SLURM_PORT + int(variables["SLURM_JOB_ID"]) % _SLURM_PORTS
    return f"{node}:{port}"


def leave(code: int) -> NoReturn:
    """Ends this process with `code`.

    After an error at once, where jax would first wait for the others to end too.
    """
    if code in (console.EXIT_OK, console.EXIT_STOPPED):
        sys.exit(code)

    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        # When it goes, jax aborts the others: let those that failed alike go by themselves.
        time.sleep(_LEAVE_SECONDS)
    os._exit(code)


def is_main() -> bool:
    """Whether this is the one process that writes logs and names files."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The `text` of each process, in order; every process has to call this."""
    # Without a look at the devices, which are not chosen yet.
    if not jax.distributed.is_initialized():
        return [text]

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))

    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)

    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def from_main(value: Any) -> Any:
    """One fact for all processes: the value that the main one has, as JSON gives it back. Every
    process has to call this."""
    return json.loads(gather(json.dumps(value))[0])


def exchange(key: str, text: str, seconds: float) -> list[str]:
    """As `gather`, for threads: through the coordinator, since the devices are at work.

    Args:
        key: the same in all processes, and new.
        text: of this process.
        seconds: where one of them says nothing for so long, what jax raises is raised.
    """
    if not jax.distributed.is_initialized():
        return [text]

    client = distributed.global_state.client
    assert client
    timeout_ms = int(1000 * seconds)
    mine = f"{key}/{jax.process_index()}"

    client.key_value_set(mine, text)
    texts = [
        client.blocking_key_value_get(f"{key}/{number}", timeout_ms)
        for number in range(jax.process_count())
    ]

    # Deleted when all have read it.
    client.wait_at_barrier(key, timeout_ms)
    client.key_value_delete(mine)
    return texts


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part that all processes pass, or none. Also a barrier.

    A UserError in one of them is raised in each, with its exit code.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error

    ours = json.dumps([mine.exit_code, str(mine)] if mine else None)
    for number, theirs in enumerate(map(json.loads, gather(ours))):
        if mine:
            raise mine
        if theirs:
            code, text = theirs
            kind = next(kind for kind in (UserError, RunError, BusyError) if kind.exit_code == code)
            raise kind(f"process {number} stopped: {text.rstrip('.')}", "Mend it there")


def check_equal(facts: Mapping[str, object]) -> None:
    """Raises UserError, naming the key, where the processes differ in one of `facts`."""
    mine = {name: str(value) for name, value in facts.items()}

    for number, theirs in enumerate(map(json.loads, gather(json.dumps(mine)))):
        for name, value in mine.items():
            if theirs[name] != value:
                what = (
                    f"the processes differ in {name}: {value} in this one, {theirs[name]} "
                    f"in process {number}"
                )
                raise UserError(what, "Start all with the same command, on the same data")
