"""Several processes that run one program, each with its own devices: how they find one another and agree."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from l1_jax.errors import RunError, UserError

START_SECONDS = 120  # for all processes to come
HEARTBEAT_SECONDS = 30  # without a sign of life a process is taken for dead, and the others end


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the job, if there are any; to be called before jax is used.

    Without arguments they are found in what Slurm (srun), a TPU pod, or the variables JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say; with none of these the process is alone. UserError where the arguments do
    not fit together, RunError where the others do not come.
    """
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    if all(value is None for value in given.values()) and "JAX_COORDINATOR_ADDRESS" in os.environ:
        coordinator, *numbers = (os.environ.get(f"JAX_{name}") for name in _VARIABLES)
        if not all(text and text.isdecimal() for text in numbers):
            remedy = "Set JAX_NUM_PROCESSES and JAX_PROCESS_ID to numbers, or unset it"
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS is {coordinator!r}, and the variables beside it are not set", remedy
            )
        num_processes, process_id = (int(text or 0) for text in numbers)
    elif missing := [flag for flag, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise UserError(f"{', '.join(missing)} is missing", f"Give all of {', '.join(given)}, or none")
        if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1 and not _on_tpu():
            return
    if num_processes is not None and not 0 <= (process_id or 0) < num_processes:
        raise UserError(f"--process-id is {process_id}", f"Give a number from 0 to {num_processes - 1}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        what = f"the processes did not find one another in {START_SECONDS} s through {coordinator or 'the cluster'}"
        remedy = "Check that every process was started, and that this host and port can be reached from all"
        raise RunError(f"{what} ({str(error).splitlines()[0]})", remedy) from error


_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def _on_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and any(
        Path(f"/dev/{n}").exists() for n in ("accel0", "vfio/0")
    )


def is_main() -> bool:
    """Whether this is the one process that writes logs and names files."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The `text` of each process, in order; every process has to call this."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A part that all processes pass, or none: a UserError in one of them is raised in each. Also a barrier."""
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    for number, text in enumerate(gather(str(mine) if mine else "")):
        if mine:
            raise mine
        if text:
            raise UserError(f"process {number} stopped: {text.rstrip('.')}", "Mend it there")


def check_equal(facts: Mapping[str, object]) -> None:
    """Raises UserError, naming the key, where the processes differ in one of `facts`."""
    mine = {name: str(value) for name, value in facts.items()}
    for number, theirs in enumerate(map(json.loads, gather(json.dumps(mine)))):
        for name, value in mine.items():
            if theirs[name] != value:
                what = f"the processes differ in {name}: {value} in this one, {theirs[name]} in process {number}"
                raise UserError(what, "Start all with the same command, on the same data")
