"""`training.batch_size: auto`: the largest microbatch that fits, by formula."""

from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.resolve import Facts, Resolved, choose_microbatches, resolve
from l1_jax.config.schema import Config
from l1_jax.devices.kinds import DeviceKind
from l1_jax.errors import UserError
from l1_jax.parallel.layout import check_divisible
from l1_jax.planner.estimate import estimate, usable_by_formula


def resolve_auto(
    config: Config,
    facts: Facts,
    mesh: Mesh | AbstractMesh,
    limit_bytes: int,
    kind: DeviceKind | None = None,
) -> Resolved:
    """`resolve`, after `choose_batch_size` where the batch size is auto."""
    if config.training.batch_size == "auto":
        config = choose_batch_size(config, facts, mesh, limit_bytes, kind)

    return resolve(config, facts)


def choose_batch_size(
    config: Config,
    facts: Facts,
    mesh: Mesh | AbstractMesh,
    limit_bytes: int,
    kind: DeviceKind | None = None,
) -> Config:
    """`config` with the most rows a device and microbatch of which the estimate fits.

    The global batch is given, so this changes how a run computes and not what.

    Args:
        config: its `training.batch_size` is auto.
        facts: what it will be resolved with.
        mesh: the devices; an abstract one is enough.
        limit_bytes: what may be used of each device.
        kind: of the devices of an abstract mesh.

    Raises:
        UserError: not even one row fits.
    """
    asked = config.parallelism.pipeline_microbatches
    stages = facts.mesh_shape["pipeline"]

    one_row = config.replace("training", batch_size=1)
    one_row = one_row.replace("parallelism", pipeline_microbatches=None)
    resolved = resolve(one_row, facts)
    check_divisible(resolved.model, mesh)

    rows = resolved.training.gradient_accumulation_steps  # of a device in a step
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    usable = usable_by_formula(limit_bytes)

    for size in sizes:
        tried = resolved.replace(
            "training", batch_size=size, gradient_accumulation_steps=rows // size
        )
        microbatches = choose_microbatches(None, size, stages)
        tried = tried.replace("parallelism", pipeline_microbatches=microbatches)
        needed = estimate(tried, mesh, kind).total_bytes

        if needed <= usable:
            choose_microbatches(asked, size, stages)  # refuses what does not divide
            return config.replace("training", batch_size=size)

    what = "training.batch_size is auto, and not even one sequence a device fits"
    sizes_gib = f"{needed / 2**30:.1f} GiB needed, {usable / 2**30:.1f} GiB usable"
    remedy = "Set training.gradient_checkpointing: true, use parallelism.fsdp"
    raise UserError(f"{what}: {sizes_gib}", f"{remedy}, or run scripts/plan.py to see what fits")
