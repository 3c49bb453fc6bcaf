"""Which devices a command runs on, and how they are set up before jax starts."""

import contextlib
import ctypes
import os
from pathlib import Path

import jax

from l1_jax.console import console, log
from l1_jax.devices.processes import is_main
from l1_jax.errors import UserError

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# Parameters of glibc's mallopt, malloc.h, and what they are set to.
_MALLOC_SETTINGS = (
    # M_ARENA_MAX: all threads share one arena.
    (-8, 1),
    # M_MMAP_MAX: no buffer is mapped apart.
    (-4, 0),
    # M_TRIM_THRESHOLD: nothing goes back to the system.
    (-1, -1),
    # M_TOP_PAD: how much is asked for beyond what is needed, in bytes.
    (-2, 1 << 26),
)


def select_devices(device: str) -> list[jax.Device]:
    """The devices that a command runs on.

    Args:
        device: `auto` (the best present), `cpu`, `gpu`, `cuda` or `tpu`.

    Raises:
        UserError: there is none of the kind.
    """
    kind = "gpu" if device == "cuda" else device
    extra = "cuda" if kind in ("auto", "gpu") else kind
    install = f'pip install -e ".[{extra}]"'

    if kind == "cpu":
        # Else an accelerator would still be claimed, and its memory taken.
        jax.config.update("jax_platforms", "cpu")

    try:
        devices = jax.devices(None if kind == "auto" else kind)
    except RuntimeError as error:
        what = f"the device {device!r} is asked for, and jax finds none here"
        raise UserError(what, f"Ask for auto, or install jax for it: {install}") from error

    fell_back = kind == "auto" and devices[0].platform == "cpu"
    if fell_back and any(Path("/dev").glob("nvidia[0-9]*")):
        log.warning(
            "this machine has an NVIDIA GPU that jax cannot use: %s, or see what nvidia-smi says",
            install,
        )

    console.quiet = not is_main()
    return devices


def make_deterministic() -> None:
    """Has XLA give the same bits each time on a GPU; to be called before jax is used.

    Raises:
        UserError: jax has started without it, on a GPU.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISTIC in flags.split():
        return

    # jax refuses this once it has started, and has no other public way to say so.
    count = jax.config.values["jax_num_cpu_devices"]
    try:
        jax.config.update("jax_num_cpu_devices", 1 if count != 1 else 2)
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.default_backend() == "gpu":
            what = "training.deterministic is set, and jax has started without it"
            remedy = f"Start Python with the environment variable XLA_FLAGS={_DETERMINISTIC}"
            raise UserError(what, remedy) from None
        return

    # Read once, when jax starts.
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one.

    Else XLA's buffers on CPU go back to the system after every step and are faulted in anew, page
    by page (benchmarks/RESULTS.md has what that costs).

    To be called before jax starts its threads: each that has an arena of its own by then maps large
    buffers apart, and unmaps them.
    """
    # Another C library has no such settings.
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in _MALLOC_SETTINGS:
            mallopt(parameter, value)
