"""How much memory of a device a program may use."""

import os
from collections.abc import Sequence

import jax

from l1_jax.devices.kinds import DeviceKind, kind_of

# What jax reserves of a GPU where XLA_PYTHON_CLIENT_MEM_FRACTION does not say.
DEFAULT_GPU_SHARE = "0.75"


def usable_bytes(kind: DeviceKind) -> int:
    """What jax may use of a device: on a GPU the part that it reserves at its start, on a TPU what
    the compiler allows."""
    share = 1.0

    if not kind.is_tpu:
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", DEFAULT_GPU_SHARE))

    return int(kind.memory_gib * share * 2**30)


def memory_limit(devices: Sequence[jax.Device]) -> int:
    """Bytes that a program may use of each of this process's `devices`.

    On an accelerator what jax's allocator has; of a CPU half of the free memory, for its compiler
    makes more temporaries than the formulas know.
    """
    device = devices[0]

    if device.platform == "cpu":
        return _free_bytes() // 2 // len(devices)

    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])

    kind = kind_of(device.device_kind)
    return usable_bytes(kind) if kind else _free_bytes() // 2 // len(devices)


def _free_bytes() -> int:
    """Memory of the host that a new program may take."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable"))
            return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
