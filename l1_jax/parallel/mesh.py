"""The devices of a run and the mesh they form."""

import contextlib
import ctypes
import math
import os
import re
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from l1_jax.cli import console, log
from l1_jax.config import MESH_AXES, ParallelismConfig
from l1_jax.config_file import config_from_text
from l1_jax.errors import UserError, nearest
from l1_jax.parallel.kinds import kind_of
from l1_jax.parallel.processes import is_main

ALL_DATA = ParallelismConfig()  # a copy of the model on every device


def parse_mesh(text: str | None) -> ParallelismConfig:
    """`fsdp=4,tensor=2` -> the sizes; the devices left over are `data`. UserError where it is not that."""
    sizes: dict[str, str] = {}
    for part in text.split(",") if text else []:
        name, _, size = part.strip().partition("=")
        if name not in MESH_AXES or name in sizes or not re.fullmatch(r"-1|[0-9]+", size):
            hint = nearest(name, MESH_AXES) if name not in MESH_AXES else ", or comes twice" if name in sizes else ""
            what = f"--mesh {text!r}: {part.strip()!r} is no AXIS=SIZE{hint}"
            raise UserError(what, f"Write it as in fsdp=4,tensor=2; the axes are {', '.join(MESH_AXES)}")
        sizes[name] = size
    return config_from_text(f"parallelism: {{{', '.join(map(': '.join, sizes.items()))}}}", "--mesh").parallelism


def select_devices(device: str) -> list[jax.Device]:
    """The devices of kind `device`: `auto` (the best present), `cpu`, `gpu`, `cuda` or `tpu`; UserError without any."""
    kind = "gpu" if device == "cuda" else device
    install = f'pip install -e ".[{"cuda" if kind in ("auto", "gpu") else kind}]"'
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # else an accelerator would still be claimed, and its memory taken
    try:
        devices = jax.devices(None if kind == "auto" else kind)
    except RuntimeError as error:
        what = f"the device {device!r} is asked for, and jax finds none here"
        raise UserError(what, f"Ask for auto, or install jax for it: {install}") from error
    if kind == "auto" and devices[0].platform == "cpu" and any(Path("/dev").glob("nvidia[0-9]*")):
        log.warning("this machine has an NVIDIA GPU that jax cannot use: %s, or see what nvidia-smi says", install)
    console.quiet = not is_main()
    return devices


_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def make_deterministic() -> None:
    """Has XLA give the same bits each time on a GPU: before jax is used, else UserError where there is one."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _DETERMINISTIC in flags.split():
        return
    count = jax.config.values["jax_num_cpu_devices"]
    try:  # jax refuses this once it has started, and has no other public way to say so
        jax.config.update("jax_num_cpu_devices", 1 if count != 1 else 2)
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.default_backend() == "gpu":
            what = "training.deterministic is set, and jax has started without it"
            remedy = f"Start Python with the environment variable XLA_FLAGS={_DETERMINISTIC}"
            raise UserError(what, remedy) from None
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()  # read once, when jax starts


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one. Else XLA's buffers on CPU go back to the system after every
    step and are faulted in anew, page by page (benchmarks/RESULTS.md has what that costs). To be called before jax
    starts its threads: each that has an arena of its own by then maps large buffers apart, and unmaps them."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such settings
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-8, 1), (-4, 0), (-1, -1), (-2, 1 << 26)):  # arenas, mmaps, trim (never), top pad
            mallopt(parameter, value)


def mesh_shape(sizes: ParallelismConfig, count: int) -> dict[str, int]:
    """The size of each of `MESH_AXES` on `count` devices; one may be -1, the rest. UserError where the product of the
    sizes is not the number of devices."""
    shape = {axis: getattr(sizes, axis) for axis in MESH_AXES}
    named = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size != 1) or "of one device"
    fixed = math.prod(size for size in shape.values() if size != -1)
    free = [axis for axis, size in shape.items() if size == -1]
    if free and count % fixed:
        what = f"the parallelism {named} does not fit {count} devices: {fixed} does not divide {count}"
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(what, f"Choose sizes whose product is one of {divisors}")
    if not free and fixed != count:
        what = f"the parallelism {named} needs {fixed} devices, and there are {count}"
        raise UserError(what, "Set one axis to -1 (the rest of the devices), or show jax another number of devices")
    return shape | dict.fromkeys(free, count // fixed)


def create_mesh(sizes: ParallelismConfig, devices: list[jax.Device]) -> Mesh:
    """Arranges all `devices` as a mesh, see `mesh_shape`."""
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def abstract_mesh(sizes: ParallelismConfig, count: int) -> AbstractMesh:
    """The same without any device."""
    shape = tuple(mesh_shape(sizes, count).values())
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def peak_flops(mesh: Mesh) -> float | None:
    """What all devices of the mesh could do in bfloat16, FLOP/s; None where the kind is not known."""
    kind = kind_of(mesh.devices.flat[0].device_kind)
    return kind.peak_flops * mesh.size if kind else None
