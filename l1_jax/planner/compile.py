"""Compiling a train step for devices that are not here."""

import importlib.util
import os
import re
import time
from typing import NamedTuple

import jax

from l1_jax.config.schema import Config
from l1_jax.devices.kinds import DeviceKind
from l1_jax.parallel.mesh import create_mesh
from l1_jax.planner.collectives import count_bytes
from l1_jax.training.program import batch_shapes, make_program

MOST_CPU_DEVICES = 64  # that are simulated
# Must stand before libtpu is loaded: that there is no TPU here, and that others may compile beside us.
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
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", min(count, MOST_CPU_DEVICES))
        except RuntimeError:  # it runs: then with the devices that it has
            return


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def find_devices(kind: DeviceKind, topology: str | None, count: int) -> tuple[str, list[jax.Device]] | None:
    """A compiler for `count` devices, and those devices: of a TPU slice through libtpu, else simulated on the CPU.
    None where there is neither."""
    if kind.is_tpu:
        shape = topology or kind.slices.get(count if count > 1 else min(kind.slices))
        if shape is None or not has_libtpu():
            return None
        from jax.experimental import topologies

        for name, value in _LIBTPU.items():
            os.environ.setdefault(name, value)
        options = {"chip_config_name": "megacore"} if shape.startswith("v4:") else {}
        return "tpu", topologies.get_topology_desc(platform="tpu", topology_name=shape, **options).devices[:count]
    devices = jax.devices("cpu")
    return ("cpu", devices[:count]) if len(devices) >= count else None


def compile_step(config: Config, compiler: str, devices: list[jax.Device]) -> Compiled:
    """Compiles the real train step of the resolved `config`. Does not run it, and needs no memory for it."""
    started = time.perf_counter()
    mesh = create_mesh(config.parallelism, devices)
    if compiler == "cpu":  # in place of others, whose kernels it has not
        config = config.replace("training", attention="auto")
    program = make_program(config, mesh)
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with jax.set_mesh(mesh):  # for the lowering alone: nothing can be computed on devices that are not here
            lowered = program.train_step.lower(program.abstract, batch_shapes(config, mesh))
        compiled = lowered.compile(compiler_options=_OPTIONS[compiler])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"(?:Used|required[^(]*\() ?([\d.]+)G", str(error))
        peak = int(float(used[1]) * 2**30) if used else None
        return Compiled(compiler, peak, {}, False, time.perf_counter() - started)
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    peak = compiled.memory_analysis().peak_memory_in_bytes if compiler == "tpu" else None
    traffic = count_bytes(compiled.as_text(), mesh.size)
    return Compiled(compiler, peak, traffic, True, time.perf_counter() - started)
