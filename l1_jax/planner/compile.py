"""Compiling a train step for devices that are not here."""

import contextlib
import importlib.util
import os
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax

from l1_jax.config.resolve import Resolved
from l1_jax.devices.kinds import DeviceKind
from l1_jax.parallel.mesh import create_mesh
from l1_jax.planner.collectives import count_bytes
from l1_jax.training.initial import expect_packing
from l1_jax.training.program import batch_shapes, make_program

MOST_CPU_DEVICES = 64  # that are simulated

# Must stand before libtpu is loaded: that there is no TPU here, and that others may compile beside
# us.
_LIBTPU = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Less optimised code, of equal size to a few per cent (measured), in a quarter of the time.
_OPTIONS: dict[str, dict[str, str | bool | int | float]] = {
    "tpu": {"exec_time_optimization_effort": -1.0},
    "cpu": {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
}


class Compiled(NamedTuple):
    """What a compiler says of a step on one device."""

    compiler: str  # "tpu" or "cpu"
    peak_bytes: int | None  # at the fullest moment, the state included; of a TPU only
    traffic: dict[str, int]  # bytes sent, by the kind of collective; empty where it does not fit
    fits: bool
    seconds: float  # that compiling took


def use_cpu(count: int) -> None:
    """Has jax run on the CPU, with `count` simulated devices where it has not started yet."""
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return

    # If jax runs already, then with the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", min(count, MOST_CPU_DEVICES))


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def find_devices(
    kind: DeviceKind, topology: str | None, count: int
) -> tuple[str, list[jax.Device]] | None:
    """A compiler, and devices that it can compile for: of a TPU slice, else simulated on the CPU.

    Args:
        kind: of the devices that are planned for.
        topology: of the TPU slice; None takes the one that has `count` devices.
        count: how many devices are wanted.

    Returns:
        "tpu" (through libtpu) or "cpu", and `count` devices; None where there is neither.
    """
    if kind.is_tpu:
        devices = _find_tpu_devices(kind, topology, count)
        return None if devices is None else ("tpu", devices)

    devices = jax.devices("cpu")
    return ("cpu", devices[:count]) if len(devices) >= count else None


def _find_tpu_devices(
    kind: DeviceKind, topology: str | None, count: int
) -> list[jax.Device] | None:
    # No slice has one device: of the smallest one, the first is taken.
    num_devices = count if count > 1 else min(kind.slices)
    shape = topology or kind.slices.get(num_devices)
    if shape is None or not has_libtpu():
        return None

    from jax.experimental import topologies

    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)

    options = {"chip_config_name": "megacore"} if shape.startswith("v4:") else {}
    description = topologies.get_topology_desc(platform="tpu", topology_name=shape, **options)
    return description.devices[:count]


def compile_step(config: Resolved, compiler: str, devices: list[jax.Device]) -> Compiled:
    """Compiles the real train step. Does not run it, and needs no memory for it.

    Args:
        config: resolved.
        compiler: "tpu" or "cpu", as `find_devices` says.
        devices: as `find_devices` says.
    """
    started = time.perf_counter()
    mesh = create_mesh(config.parallelism, devices)
    if compiler == "cpu":  # in place of others, whose kernels it has not
        config = config.replace("training", attention="auto")
    program = make_program(config, mesh, packing=expect_packing(config))

    try:
        with _without_cache():
            # The mesh is set for the lowering alone: nothing can be computed on devices that are
            # not here.
            with jax.set_mesh(mesh):
                shapes = batch_shapes(config, mesh)
                lowered = program.train_step.lower(program.abstract, program.borrowed, shapes)
            compiled = lowered.compile(compiler_options=_OPTIONS[compiler])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(
            compiler=compiler,
            peak_bytes=_needed_bytes(str(error)),
            traffic={},
            fits=False,
            seconds=time.perf_counter() - started,
        )

    is_tpu = compiler == "tpu"
    return Compiled(
        compiler=compiler,
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes if is_tpu else None,
        traffic=count_bytes(compiled.as_text(), mesh.size),
        fits=True,
        seconds=time.perf_counter() - started,
    )


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Keeps what is compiled meanwhile out of the compilation cache."""
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)


def _needed_bytes(error: str) -> int | None:
    """The memory that a compiler says it had needed; None where it does not say."""
    used = re.search(r"(?:Used|required[^(]*\() ?([\d.]+)G", error)
    return int(float(used[1]) * 2**30) if used else None
