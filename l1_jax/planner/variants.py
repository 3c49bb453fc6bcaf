"""Other ways to run a config with the same result: the mesh, the microbatch, what is recomputed."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.schema import Config
from l1_jax.console import log
from l1_jax.devices.kinds import DeviceKind
from l1_jax.errors import UserError
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.mesh import abstract_mesh
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.planner.estimate import Estimate, estimate, usable_by_formula
from l1_jax.run.resolve import resolve, resolve_batch
from l1_jax.training.program import remat_policy

REMAT = ("none", "dots", "dots_no_batch", "full")  # more and more is recomputed


class Variant(NamedTuple):
    """A resolved config with another way to run it, and what that costs."""

    config: Config
    estimate: Estimate
    changes: dict[str, int | str]  # keys of the config with their new values


def resolve_auto(
    config: Config,
    vocab_size: int,
    num_tokens: int,
    mesh: Mesh | AbstractMesh,
    resumed_batch: int | None,
    limit: int,
    kind: DeviceKind | None = None,
) -> Config:
    """`resolve`, and where training.batch_size is auto, the most rows of which the estimate fits `limit` bytes. `kind`
    is that of the devices of an abstract mesh.

    The global batch is given, so this changes how a run computes and not what. UserError where not even one row fits.
    """
    if config.training.batch_size == "auto":
        config = _largest(config, vocab_size, num_tokens, mesh, resumed_batch, limit, kind)
    else:
        config = resolve(config, vocab_size, num_tokens, mesh, resumed_batch)
    count, stages = config.parallelism.pipeline_microbatches, mesh.shape["pipeline"]
    if count and stages > 1:
        bubble = (stages - 1) / (count + stages - 1)
        log.info("pipeline: %d parts of a microbatch through %d stages, bubble %.0f %%", count, stages, 100 * bubble)
    return config


def _largest(
    config: Config,
    vocab_size: int,
    num_tokens: int,
    mesh: Mesh | AbstractMesh,
    resumed_batch: int | None,
    limit: int,
    kind: DeviceKind | None,
) -> Config:
    asked = config.parallelism.pipeline_microbatches
    config = config.replace("parallelism", pipeline_microbatches=None).replace("training", batch_size=1)
    config = resolve(config, vocab_size, num_tokens, mesh, resumed_batch)
    check_divisible(config.model, mesh)
    rows = config.training.gradient_accumulation_steps  # of a device in a step
    for size in sorted((n for n in range(1, rows + 1) if rows % n == 0), reverse=True):
        microbatches = Layout.of(mesh, size).microbatches
        tried = config.replace("training", batch_size=size, gradient_accumulation_steps=rows // size)
        tried = tried.replace("parallelism", pipeline_microbatches=microbatches)
        found = estimate(tried, mesh, kind).total_bytes
        if found <= usable_by_formula(limit):
            return tried.replace("parallelism", pipeline_microbatches=Layout.of(mesh, size, asked).microbatches)
    what = f"training.batch_size is auto, and not even one sequence a device fits: {found / 2**30:.1f} GiB needed"
    remedy = "Set training.gradient_checkpointing: true, use parallelism.fsdp, or run scripts/plan.py to see what fits"
    raise UserError(f"{what}, {usable_by_formula(limit) / 2**30:.1f} GiB usable", remedy)


def meshes(count: int) -> Iterator[ParallelismConfig]:
    """All ways to arrange `count` devices."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    for shape in itertools.product(sizes, repeat=len(MESH_AXES) - 1):
        rest = count
        for size in shape:
            rest = rest // size if rest % size == 0 else 0
        if rest:
            yield ParallelismConfig(**dict(zip(MESH_AXES, (*shape, rest), strict=True)))


def make_variant(
    config: Config, kind: DeviceKind, count: int, sizes: ParallelismConfig, remat: str, rows: int
) -> Variant | None:
    """`config`, resolved (its pipeline_microbatches as asked for), on another mesh with at most `rows` rows per device
    and microbatch; the global batch stays. None where the model or the batch does not divide, or `training.attention`
    cannot run."""
    mesh = abstract_mesh(sizes, count)
    try:
        check_divisible(config.model, mesh)
        batch = resolve_batch(config.replace("training", batch_size=rows).training, Layout.of(mesh).rows, None)
    except UserError:
        return None
    asked = config.parallelism.pipeline_microbatches
    divides = asked and batch["batch_size"] % asked == 0
    microbatches = Layout.of(mesh, batch["batch_size"], asked if divides else None).microbatches
    old = {"training": config.training, "parallelism": config.parallelism}
    checkpointing = config.training.gradient_checkpointing if remat_policy(config) == remat else remat
    config = config.replace("training", **batch, gradient_checkpointing=checkpointing)
    config = config.replace("parallelism", **dict(mesh.shape), pipeline_microbatches=microbatches)
    changes = {
        f"{section}.{name}": value
        for section, before in old.items()
        for name, value in vars(getattr(config, section)).items()
        if getattr(before, name) not in (value, *((None,) if name == "pipeline_microbatches" else ()))
    }
    try:
        return Variant(config, estimate(config, mesh, kind), changes)
    except UserError:
        return None


def search(config: Config, kind: DeviceKind, count: int, limit: int) -> list[Variant]:
    """The legal meshes of `count` devices by step time, those that fit `limit` bytes first. All by formula; the
    microbatch is at most what it is."""
    rows, remat = config.training.batch_size, remat_policy(config)
    assert isinstance(rows, int)
    found = (make_variant(config, kind, count, sizes, remat, rows) for sizes in meshes(count))
    usable = usable_by_formula(limit)
    return sorted(filter(None, found), key=lambda v: (v.estimate.total_bytes > usable, v.estimate.step_seconds))


def cheaper_in_memory(config: Config, kind: DeviceKind, count: int, usable: int) -> list[Variant]:
    """Changes with which the estimate is at most `usable` bytes, the fastest first; among equals the fewest changes."""
    rows = config.training.batch_size
    assert isinstance(rows, int)
    policies = REMAT[REMAT.index(remat_policy(config)) :]
    shapes = [ParallelismConfig(**{axis: getattr(config.parallelism, axis) for axis in MESH_AXES})]
    shapes += [sizes for sizes in meshes(count) if sizes != shapes[0]]
    smaller = [n for n in range(rows, 0, -1) if rows % n == 0]
    tried = (
        make_variant(config, kind, count, *what)  # type: ignore[arg-type]
        for what in itertools.product(shapes, policies, smaller)
    )
    fits = [v for v in tried if v and v.changes and v.estimate.total_bytes <= usable]
    return sorted(fits, key=lambda v: (round(v.estimate.step_seconds, 4), len(v.changes)))
