"""What a config needs and costs on devices that are not here."""

import dataclasses

import jax

from l1_jax.config.resolve import Facts, Resolved, rows_of_stream, stages
from l1_jax.config.schema import Config
from l1_jax.config.stages import largest, tokens_before
from l1_jax.devices.kinds import DeviceKind, find_kind
from l1_jax.devices.memory import usable_bytes
from l1_jax.errors import UserError
from l1_jax.model.flops import flops_per_token
from l1_jax.parallel.layout import check_divisible
from l1_jax.parallel.mesh import abstract_mesh
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.planner.batch_size import resolve_auto
from l1_jax.planner.compile import Compiled, compile_step, find_devices, use_cpu
from l1_jax.planner.estimate import (
    Estimate,
    estimate,
    network_seconds,
    step_seconds,
    usable_by_formula,
)
from l1_jax.planner.state_size import state_bytes
from l1_jax.planner.variants import Search, Variant, cheaper_in_memory, rank_meshes
from l1_jax.training.program import remat_policy

MOST_TRIES = 3  # changes that are compiled to see whether they fit

_UNKNOWN_STEPS = 10**6  # stands for a length that only the data would give
_ENOUGH_TOKENS = 2**62  # for any length

Compiler = tuple[str, list[jax.Device]]  # "tpu" or "cpu", and the devices that it compiles for


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    config: Resolved
    kind: DeviceKind
    count: int
    num_parameters: int
    flops_per_token: int
    estimate: Estimate
    compiled: Compiled | None
    limit_bytes: int  # that jax may use of a device
    steps: int | None  # None: the data decides
    change: Variant | None  # the cheapest that fits, where this does not
    change_compiled: Compiled | None
    ranking: list[Variant] | None  # the legal meshes, where they were asked for

    @property
    def fits(self) -> bool:
        return _fits(self.estimate, self.compiled, self.limit_bytes)

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that a device sends in a step: the TPU compiler's, else by formula."""
        compiled = self.compiled
        is_tpus = compiled is not None and compiled.compiler == "tpu" and compiled.fits
        return compiled.traffic if compiled and is_tpus else self.estimate.traffic

    @property
    def seconds(self) -> dict[str, float]:
        return self.estimate.seconds | {"network": network_seconds(self.traffic, self.kind)}

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.seconds)

    @property
    def tokens_per_step(self) -> int:
        """Of the largest batch, which is what is planned."""
        stage = largest(stages(self.config))
        return stage.rows * stage.length

    @property
    def tokens(self) -> int | None:
        """Of the whole run; None: the data decides."""
        return tokens_before(stages(self.config), self.steps) if self.steps else None


def plan(
    config: Config,
    device_kind: str,
    count: int | None,
    sizes: ParallelismConfig | None = None,
    *,
    ranks_meshes: bool = False,
) -> Plan:
    """Plans `config` on `count` devices of a kind.

    Args:
        config: of the run.
        device_kind: what `find_kind` knows.
        count: may be left out where the kind is a TPU slice.
        sizes: the mesh, if it is not to be the config's own.
        ranks_meshes: also all legal meshes are looked at.

    Raises:
        UserError: the kind, the count or the mesh do not fit one another.
    """
    kind, topology = find_kind(device_kind)
    count = _check_count(device_kind, kind, topology, count)
    use_cpu(count)

    if sizes is not None:
        axes = {axis: getattr(sizes, axis) for axis in MESH_AXES}
        config = config.replace("parallelism", **axes)

    limit_bytes = usable_bytes(kind)
    settled = settle(config, kind, count, limit_bytes)
    mesh = abstract_mesh(settled.parallelism, count)

    size = state_bytes(settled, mesh)
    found = estimate(settled, mesh, kind)

    # A CPU tells of traffic alone, and one device has none.
    compiler = find_devices(kind, topology, count) if kind.is_tpu or count > 1 else None
    compiled = compile_step(settled, *compiler) if compiler else None

    search = Search(settled, config.parallelism.pipeline_microbatches, kind, count)
    change, change_compiled = None, None

    if not _fits(found, compiled, limit_bytes):
        change, change_compiled = _find_change(search, compiler, limit_bytes)

    return Plan(
        config=settled,
        kind=kind,
        count=count,
        num_parameters=size.num_parameters,
        flops_per_token=flops_per_token(size.num_parameters, settled.model, size.frozen),
        estimate=found,
        compiled=compiled,
        limit_bytes=limit_bytes,
        steps=config.training.max_steps,
        change=change,
        change_compiled=change_compiled,
        ranking=rank_meshes(search, limit_bytes) if ranks_meshes else None,
    )


def _check_count(
    device_kind: str, kind: DeviceKind, topology: str | None, count: int | None
) -> int:
    """How many devices there are; UserError where that is not said, or twice."""
    in_slice = next((size for size, name in kind.slices.items() if name == topology), None)

    if count is None and in_slice is None:
        raise UserError("`devices` is missing", "Say how many devices there are, as in `devices` 8")

    if in_slice and count not in (None, in_slice):
        what = f"`devices` is {count}, and {device_kind} has {in_slice}"
        word = device_kind.partition(":")[0]
        raise UserError(what, f"Leave `devices` out, or say `device_kind` {word}")

    count = in_slice or count

    if not count or count < 1:
        raise UserError(f"`devices` is {count}", "Give 1 or more")

    return count


def _find_change(
    search: Search, compiler: Compiler | None, limit_bytes: int
) -> tuple[Variant | None, Compiled | None]:
    """The cheapest change with which the config fits, and what the TPU compiler says of it."""
    # It decides by itself, so that its candidates need no reserve.
    asks_tpu = compiler is not None and search.kind.is_tpu
    usable = limit_bytes if asks_tpu else usable_by_formula(limit_bytes)

    for change in cheaper_in_memory(search, usable)[:MOST_TRIES]:
        compiled = compile_step(change.config, *compiler) if compiler and asks_tpu else None

        if _fits(change.estimate, compiled, limit_bytes):
            return change, compiled

    return None, None


def settle(config: Config, kind: DeviceKind, count: int, limit_bytes: int) -> Resolved:
    """`config` resolved as a run on an accelerator would, but without data: the vocabulary is
    `model.vocab_size`."""
    mesh = abstract_mesh(config.parallelism, count)
    steps = config.training.max_steps or _UNKNOWN_STEPS

    facts = Facts(
        vocab_size=config.model.vocab_size,
        num_rows=rows_of_stream(_ENOUGH_TOKENS),
        mesh_shape=dict(mesh.shape),
        platform="tpu" if kind.is_tpu else "gpu",
    )
    config = config.replace("training", max_steps=steps)
    resolved = resolve_auto(config, facts, mesh, limit_bytes, kind)

    check_divisible(resolved.model, mesh)
    return resolved.replace("parallelism", **dict(mesh.shape))


def _fits(found: Estimate, compiled: Compiled | None, limit_bytes: int) -> bool:
    """By the TPU compiler where there is one, else by formula and with a reserve."""
    if compiled and compiled.compiler == "tpu":
        return compiled.fits

    return found.total_bytes <= usable_by_formula(limit_bytes)


def describe(config: Resolved, attention: str) -> str:
    """The mesh, the microbatch, what is kept, and the way of attention."""
    sizes = {axis: getattr(config.parallelism, axis) for axis in MESH_AXES}
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)

    count = config.training.gradient_accumulation_steps
    rows = f"{config.training.batch_size} sequences a device"

    if count > 1:
        rows += f" x {count} microbatches"

    remat = f"gradient_checkpointing {remat_policy(config)}"
    return f"{mesh or 'one device'}, {rows}, {remat}, {attention} attention"
