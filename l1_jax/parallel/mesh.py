"""The mesh that the devices form."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from l1_jax.errors import UserError
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig

ALL_DATA = ParallelismConfig()  # a copy of the model on every device

# XLA chooses the placement of what `sharding.constrain` does not pin.
AXIS_TYPES = (AxisType.Auto,) * len(MESH_AXES)


def mesh_shape(sizes: ParallelismConfig, count: int) -> dict[str, int]:
    """The size of each of `MESH_AXES` on `count` devices.

    Args:
        sizes: of the axes; one may be -1, the rest of the devices.
        count: the number of devices.

    Raises:
        UserError: where the product of the sizes is not the number of devices.
    """
    asked = {axis: getattr(sizes, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    free_axes = [axis for axis, size in asked.items() if size == -1]

    # One axis takes the rest: the others must leave a whole number of devices to it.
    if free_axes and count % fixed:
        fit = f"does not fit {count} devices: {fixed} does not divide {count}"
        divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise UserError(
            f"the parallelism {_describe(asked)} {fit}",
            f"Choose sizes whose product is one of {divisors}",
        )

    # No axis does: together they must be all devices.
    if not free_axes and fixed != count:
        raise UserError(
            f"the parallelism {_describe(asked)} needs {fixed} devices, and there are {count}",
            "Set one axis to -1 (the rest of the devices), or show jax another number of devices",
        )

    rest = dict.fromkeys(free_axes, count // fixed)
    return asked | rest


def create_mesh(sizes: ParallelismConfig, devices: list[jax.Device]) -> Mesh:
    """Arranges all `devices` as a mesh, see `mesh_shape`."""
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(
        axis_shapes=tuple(shape.values()),
        axis_names=MESH_AXES,
        axis_types=AXIS_TYPES,
        devices=devices,
    )


def abstract_mesh(sizes: ParallelismConfig, count: int) -> AbstractMesh:
    """The mesh of `create_mesh`, without any device."""
    shape = mesh_shape(sizes, count)
    return AbstractMesh(tuple(shape.values()), MESH_AXES, axis_types=AXIS_TYPES)


def _describe(asked: dict[str, int]) -> str:
    """As an error names it: the axes that are not 1."""
    parts = [f"{axis} {size}" for axis, size in asked.items() if size != 1]
    return " x ".join(parts) or "of one device"
