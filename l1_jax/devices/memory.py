"""How much memory of a device a program may use."""

import os

from jax.sharding import Mesh

from l1_jax.devices.kinds import DeviceKind, kind_of


def usable_bytes(kind: DeviceKind) -> int:
    """What jax may use of the device: on a GPU the part that it reserves at its start, on a TPU what the compiler
    allows."""
    share = 1.0 if kind.is_tpu else float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
    return int(kind.memory_gib * share * 2**30)


def memory_limit(mesh: Mesh) -> int:
    """Bytes that a run may use of each device: on an accelerator what jax's allocator has; of a CPU half of the free
    memory, for its compiler makes more temporaries than the formulas know."""
    device = mesh.local_devices[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform != "cpu" and (kind := kind_of(device.device_kind)):
        return usable_bytes(kind)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // 2 // len(mesh.local_devices)
