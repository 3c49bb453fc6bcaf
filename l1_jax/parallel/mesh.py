"""The mesh that the devices form."""

import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from l1_jax.errors import UserError
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig

ALL_DATA = ParallelismConfig()  # a copy of the model on every device


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
