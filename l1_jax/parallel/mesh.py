"""The devices of a run and the mesh they form."""

import glob
import importlib.util

import jax
from jax.sharding import AxisType, Mesh

from l1_jax.cli import log
from l1_jax.config import ParallelismConfig
from l1_jax.errors import UserError

# The order is the order of the devices: neighbours differ in `tensor`, whose messages are the most urgent.
AXES = ("data", "fsdp", "tensor")

_INSTALL = {"gpu": 'pip install -e ".[cuda]"', "tpu": 'pip install -e ".[tpu]"'}


def select_devices(device: str) -> list[jax.Device]:
    """The devices of kind `device`.

    Args:
        device: `auto` (the best kind present), `cpu`, `gpu`, `cuda` or `tpu`.

    Raises:
        UserError: there is none of that kind.
    """
    kind = "gpu" if device == "cuda" else device
    if kind == "cpu":
        jax.config.update("jax_platforms", "cpu")  # else an accelerator would still be claimed, and its memory taken
    try:
        devices = jax.devices() if kind == "auto" else jax.devices(kind)
    except RuntimeError as error:
        raise UserError(
            f"training.device is {device!r}, and jax finds none here",
            f"Set training.device=auto, or install jax for it: {_INSTALL.get(kind, 'see docs/install.md')}",
        ) from error
    if devices[0].platform == "cpu" and kind == "auto" and glob.glob("/dev/nvidia[0-9]*"):
        if (
            importlib.util.find_spec("jax_cuda13_plugin") is None
            and importlib.util.find_spec("jax_cuda12_plugin") is None
        ):
            log.warning("this machine has an NVIDIA GPU that jax cannot use; to use it: %s", _INSTALL["gpu"])
        else:
            log.warning("this machine has an NVIDIA GPU, but jax's CUDA plugin does not start; check with nvidia-smi")
    return devices


def create_mesh(sizes: ParallelismConfig, devices: list[jax.Device]) -> Mesh:
    """Arranges all `devices` as a mesh with the axes `AXES`.

    Raises:
        UserError: the product of the sizes is not the number of devices.
    """
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    named = " x ".join(f"{axis} {size}" for axis, size in shape.items())
    fixed = 1
    for size in shape.values():
        fixed *= 1 if size == -1 else size
    if free := [axis for axis, size in shape.items() if size == -1]:
        if len(devices) % fixed:
            raise UserError(
                f"the parallelism {named} does not fit {len(devices)} devices: {fixed} does not divide {len(devices)}",
                f"Choose sizes whose product divides {len(devices)}",
            )
        shape[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise UserError(
            f"the parallelism {named} needs {fixed} devices, and there are {len(devices)}",
            "Set one axis to -1 (the rest of the devices), or show jax another number of devices",
        )
    return jax.make_mesh(tuple(shape.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


# Dense bfloat16 peaks in FLOP/s by jax's `device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(mesh: Mesh) -> float | None:
    """What all devices of the mesh could do in bfloat16, FLOP/s; None where the kind is not known."""
    one = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)
    return one and one * mesh.size
