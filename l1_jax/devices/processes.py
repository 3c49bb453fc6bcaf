"""Several processes that run one program, each with its own devices: how they find one another and
agree."""

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
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from l1_jax import console
from l1_jax.errors import BusyError, RunError, UserError

HEARTBEAT_SECONDS = (
    30  # a process without a sign of life for so long is taken for dead, and the others end
)
SHUTDOWN_SECONDS = 120  # how long a process that is done waits for the others


def start(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int = 120
) -> None:
    """Joins the other processes of the job, if there are any; to be called before jax is used.

    Without arguments they are found by what Slurm (srun), a TPU pod, or the variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; with none of these the
    process is alone. UserError where the arguments do not fit together. Where not all come within
    `timeout` seconds, this process ends with a message and code 75.
    """
    given: list[Any] = [coordinator, num_processes, process_id]
    names = ["`coordinator`", "`num_processes`", "`process_id`"]
    if given == [None] * 3 and any(os.environ.get(name) for name in _VARIABLES):
        given, names = [os.environ.get(name) for name in _VARIABLES], _VARIABLES
    missing = [name for name, value in zip(names, given, strict=True) if value is None]
    if timeout < 1:
        raise UserError(f"`join_timeout` is {timeout}", "Give the seconds to wait, at least 1")
    if 0 < len(missing) < 3:
        raise UserError(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} missing",
            f"Give all of {', '.join(names)}, or none",
        )
    options: dict[str, Any] = {}
    if not missing:
        address, count, number = (str(value) for value in given)
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"{names[1]} is {count} and {names[2]} {number}",
                "Give whole numbers, the processes counted from 0",
            )
        if not address.rpartition(":")[2].isdecimal():
            raise UserError(f"{names[0]} {address} has no port", "Give HOST:PORT, the same to all")
        options = {
            "coordinator_address": address,
            "num_processes": int(count),
            "process_id": int(number),
        }
        options["cluster_detection_method"] = "deactivate"
    elif (tasks := int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        options["coordinator_address"] = address = slurm_address(os.environ)
        if tasks == int(os.environ.get("SLURM_STEP_NUM_NODES", "0")) or "," not in os.environ.get(
            _GPUS, ","
        ):
            options[
                "local_device_ids"
            ] = []  # all that the task sees; else jax gives the i-th GPU to the i-th task
    elif importlib.util.find_spec("libtpu") and any(
        Path(f"/dev/{name}").exists() for name in ("accel0", "vfio/0")
    ):
        workers = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS") or os.environ.get(
            "TPU_WORKER_HOSTNAMES"
        )
        address = (
            re.split("[:,]", workers)[0] + ":8482"
            if workers
            else "port 8482 of the first worker of the TPU"
        )
    else:
        return

    def give_up() -> None:  # jax itself would abort without a word that helps
        remedy = (
            "See that every process was started, each with its own number, and that all "
            "reach this host and port"
        )
        print(
            f"error: not all processes joined at {address} in {timeout} s. {remedy}.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(BusyError.exit_code)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    limits: Any = {
        "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": SHUTDOWN_SECONDS,
    }
    try:
        jax.distributed.initialize(**options, **limits, initialization_timeout=timeout + 20)
    except (RuntimeError, ValueError) as error:
        if not options and "coordinator_address should be defined" in str(
            error
        ):  # jax knows better: there is no TPU
            timer.cancel()
            return
        what = f"the processes cannot join at {address}: {str(error).splitlines()[0].rstrip('.')}"
        raise UserError(
            what, "Choose a free port, and start every process with the same address"
        ) from error
    timer.cancel()
    results = os.dup(1)
    os.dup2(2, 1)  # what libraries print of their connections is no result
    # Open to the end.
    sys.stdout = open(results, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    console.leave = leave


def slurm_address(variables: Mapping[str, str]) -> str:
    """Where the tasks of a job step meet: its first node, at a port that follows from the job's
    number."""
    first = re.match(
        r"([^,\[]+)(?:\[([^],-]+))?", variables["SLURM_STEP_NODELIST"]
    )  # a,b or a[01-04,07]
    assert first
    return f"{first[1]}{first[2] or ''}:{61440 + int(variables['SLURM_JOB_ID']) % 4096}"


_VARIABLES = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
_GPUS = "CUDA_VISIBLE_DEVICES"


def leave(code: int) -> NoReturn:
    """Ends this process with `code`; after an error at once, where jax would first wait for the
    others to end too."""
    if code not in (console.EXIT_OK, console.EXIT_STOPPED):
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main():
            time.sleep(
                1.0
            )  # when it goes, jax aborts the others: let those that failed alike go by themselves
        os._exit(code)
    sys.exit(code)


def is_main() -> bool:
    """Whether this is the one process that writes logs and names files."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The `text` of each process, in order; every process has to call this."""
    if (
        not jax.distributed.is_initialized()
    ):  # without a look at the devices, which are not chosen yet
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
    """As `gather`, for threads: through the coordinator, since the devices are at work. `key` is
    the same in all processes, and new. Raises what jax does where one of them says nothing for so
    many seconds."""
    if not jax.distributed.is_initialized():
        return [text]
    client, timeout = distributed.global_state.client, int(1000 * seconds)
    assert client
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    texts = [
        client.blocking_key_value_get(f"{key}/{number}", timeout)
        for number in range(jax.process_count())
    ]
    client.wait_at_barrier(key, timeout)
    client.key_value_delete(f"{key}/{jax.process_index()}")
    return texts


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part that all processes pass, or none: a UserError in one of them is raised in each, with
    its exit code. Also a barrier."""
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
