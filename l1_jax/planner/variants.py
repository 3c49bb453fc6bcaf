"""Other ways to run a config with the same result: the mesh, the microbatch, what is recomputed."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from l1_jax.config.resolve import Resolved, resolve_batch
from l1_jax.devices.kinds import DeviceKind
from l1_jax.errors import UserError
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.mesh import abstract_mesh
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.planner.estimate import Estimate, estimate, usable_by_formula
from l1_jax.training.program import remat_policy

REMAT = ("none", "dots", "dots_no_batch", "full")  # more and more is recomputed


class Variant(NamedTuple):
    """A resolved config with another way to run it, and what that costs."""

    config: Resolved
    estimate: Estimate
    changes: dict[str, int | str | None]  # keys of the config with their new values


class Search(NamedTuple):
    """What the variants of a config have in common."""

    config: Resolved
    asked_microbatches: int | None  # parallelism.pipeline_microbatches, as it was written
    kind: DeviceKind
    num_devices: int

    @property
    def rows(self) -> int:
        """The most rows per device and microbatch."""
        return self.config.training.batch_size


def meshes(count: int) -> Iterator[ParallelismConfig]:
    """All ways to arrange `count` devices."""
    sizes = [n for n in range(1, count + 1) if count % n == 0]

    for shape in itertools.product(sizes, repeat=len(MESH_AXES) - 1):
        rest = count

        for size in shape:
            rest = rest // size if rest % size == 0 else 0

        if rest:
            yield ParallelismConfig(**dict(zip(MESH_AXES, (*shape, rest), strict=True)))


def make_variant(search: Search, sizes: ParallelismConfig, remat: str, rows: int) -> Variant | None:
    """The config on another mesh with at most `rows` rows per device and microbatch.

    The global batch stays. None where the model or the batch does not divide, or
    `training.attention` cannot run.
    """
    old = search.config
    mesh = abstract_mesh(sizes, search.num_devices)

    try:
        check_divisible(old.model, mesh)
        fewer_rows = old.replace("training", batch_size=rows).training
        batch = resolve_batch(fewer_rows, Layout.of(mesh).rows, resumed_batch=None)
    except UserError:
        return None

    asked = search.asked_microbatches
    divides = asked is not None and batch.size % asked == 0
    microbatches = Layout.of(mesh, batch.size, asked if divides else None).microbatches

    # Two names of one policy are no change.
    checkpointing: Any = remat
    if remat_policy(old) == remat:
        checkpointing = old.training.gradient_checkpointing

    new = old.replace(
        "training",
        batch_size=batch.size,
        gradient_accumulation_steps=batch.accumulation,
        gradient_checkpointing=checkpointing,
    )
    new = new.replace("parallelism", **dict(mesh.shape), pipeline_microbatches=microbatches)

    try:
        found = estimate(new, mesh, search.kind)
    except UserError:
        return None

    return Variant(new, found, _changes(search, new))


def _changes(search: Search, new: Resolved) -> dict[str, int | str | None]:
    """The keys whose value is another one; of the pipeline's microbatches only where they were
    asked for. Without a pipeline nothing may be asked for."""
    old = search.config
    changes: dict[str, int | str | None] = {}

    for section in ("training", "parallelism"):
        before = vars(getattr(old, section))

        for name, value in vars(getattr(new, section)).items():
            if name == "pipeline_microbatches":
                if search.asked_microbatches is not None and new.parallelism.pipeline == 1:
                    changes[f"{section}.{name}"] = None
                elif search.asked_microbatches not in (None, value):
                    changes[f"{section}.{name}"] = value
            elif before[name] != value:
                changes[f"{section}.{name}"] = value

    return changes


def rank_meshes(search: Search, limit_bytes: int) -> list[Variant]:
    """The legal meshes by step time, those that fit first. All by formula."""
    remat = remat_policy(search.config)
    usable = usable_by_formula(limit_bytes)
    tried = (
        make_variant(search, sizes, remat, search.rows) for sizes in meshes(search.num_devices)
    )

    def rank(variant: Variant) -> tuple[bool, float]:
        found = variant.estimate
        return found.total_bytes > usable, found.step_seconds

    return sorted(filter(None, tried), key=rank)


def cheaper_in_memory(search: Search, usable_bytes: int) -> list[Variant]:
    """Changes with which the estimate is at most `usable_bytes`, the fastest first; among equals
    the fewest changes."""
    config = search.config
    own = ParallelismConfig(**{axis: getattr(config.parallelism, axis) for axis in MESH_AXES})

    shapes = [own, *(sizes for sizes in meshes(search.num_devices) if sizes != own)]
    policies = REMAT[REMAT.index(remat_policy(config)) :]
    rows = [n for n in range(search.rows, 0, -1) if search.rows % n == 0]

    fits = []

    for sizes, policy, size in itertools.product(shapes, policies, rows):
        variant = make_variant(search, sizes, policy, size)

        if variant and variant.changes and variant.estimate.total_bytes <= usable_bytes:
            fits.append(variant)

    return sorted(fits, key=lambda v: (round(v.estimate.step_seconds, 4), len(v.changes)))
