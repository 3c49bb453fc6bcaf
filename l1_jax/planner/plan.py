"""What a config needs and costs on devices that are not here."""

import dataclasses

from l1_jax.config.schema import Config
from l1_jax.devices.kinds import DeviceKind, find_kind
from l1_jax.devices.memory import usable_bytes
from l1_jax.errors import UserError
from l1_jax.model.flops import flops_per_token
from l1_jax.parallel.layout import check_divisible
from l1_jax.parallel.mesh import abstract_mesh
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.planner.compile import Compiled, compile_step, find_devices, use_cpu
from l1_jax.planner.estimate import Estimate, estimate, network_seconds, state_bytes, step_seconds, usable_by_formula
from l1_jax.planner.variants import Variant, cheaper_in_memory, resolve_auto, search
from l1_jax.training.program import remat_policy

MOST_TRIES = 3  # changes that are compiled to see whether they fit
_UNKNOWN_STEPS = 10**6  # stands for a length that only the data would give


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    config: Config  # resolved
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
        is_tpus = self.compiled and self.compiled.compiler == "tpu" and self.compiled.fits
        return self.compiled.traffic if self.compiled and is_tpus else self.estimate.traffic

    @property
    def seconds(self) -> dict[str, float]:
        return self.estimate.seconds | {"network": network_seconds(self.traffic, self.kind)}

    @property
    def step_seconds(self) -> float:
        return step_seconds(self.seconds)

    @property
    def tokens_per_step(self) -> int:
        assert self.config.training.global_batch_size
        return self.config.training.global_batch_size * self.config.model.max_seq_length


def plan(
    config: Config,
    device_kind: str,
    count: int | None,
    sizes: ParallelismConfig | None = None,
    *,
    searches: bool = False,
) -> Plan:
    """Plans `config` on `count` devices of a kind (`find_kind`), in the mesh `sizes` if given, else the config's own.
    `count` may be left out where the kind is a TPU slice. UserError where the two or the mesh do not fit."""
    kind, topology = find_kind(device_kind)
    in_slice = next((size for size, name in kind.slices.items() if name == topology), None)
    if count is None and in_slice is None:
        raise UserError("--devices is missing", "Say how many devices there are, as in --devices 8")
    if in_slice and count not in (None, in_slice):
        what = f"--devices is {count}, and {device_kind} has {in_slice}"
        raise UserError(what, f"Leave --devices out, or say --device-kind {device_kind.partition(':')[0]}")
    count = in_slice or count
    if not count or count < 1:
        raise UserError(f"--devices is {count}", "Give 1 or more")
    use_cpu(count)
    if sizes is not None:
        config = config.replace("parallelism", **{axis: getattr(sizes, axis) for axis in MESH_AXES})
    steps, limit, microbatches = config.training.max_steps, usable_bytes(kind), config.parallelism.pipeline_microbatches
    config = settle(config, count, limit, kind)
    mesh = abstract_mesh(config.parallelism, count)
    num_parameters = state_bytes(config, mesh).num_parameters
    found = estimate(config, mesh, kind)
    where = find_devices(kind, topology, count) if kind.is_tpu or count > 1 else None  # a CPU tells of traffic alone
    compiled = compile_step(config, *where) if where else None
    asked = config.replace("parallelism", pipeline_microbatches=microbatches)
    change, change_compiled = None, None
    if not _fits(found, compiled, limit):
        asks_tpu = where is not None and kind.is_tpu  # which decides by itself, so that its candidates need no reserve
        usable = limit if asks_tpu else usable_by_formula(limit)
        for change in cheaper_in_memory(asked, kind, count, usable)[:MOST_TRIES]:
            change_compiled = compile_step(change.config, *where) if where and asks_tpu else None
            if _fits(change.estimate, change_compiled, limit):
                break
        else:
            change, change_compiled = None, None
    ranking = search(asked, kind, count, limit) if searches else None
    per_token = flops_per_token(num_parameters, config.model)
    return Plan(
        config, kind, count, num_parameters, per_token, found, compiled, limit, steps, change, change_compiled, ranking
    )


def settle(config: Config, count: int, limit: int, kind: DeviceKind) -> Config:
    """`config` resolved as a run on an accelerator would, but without data: the vocabulary is model.vocab_size."""
    training, vocab_size = config.training, config.model.vocab_size
    precision = "bfloat16" if training.precision == "auto" and not training.fp16 else training.precision
    config = config.replace("training", precision=precision, max_steps=training.max_steps or _UNKNOWN_STEPS)
    mesh = abstract_mesh(config.parallelism, count)
    config = resolve_auto(
        config, vocab_size, 2**62, mesh, None, limit, kind
    )  # so many tokens are enough for any length
    check_divisible(config.model, mesh)
    return config.replace("parallelism", **dict(mesh.shape))


def _fits(found: Estimate, compiled: Compiled | None, limit: int) -> bool:
    """By the TPU compiler where there is one, else by formula and with a reserve."""
    if compiled and compiled.compiler == "tpu":
        return compiled.fits
    return found.total_bytes <= usable_by_formula(limit)


def describe(config: Config, attention: str) -> str:
    """The mesh, the microbatch, what is kept, and the way of attention."""
    sizes = {axis: getattr(config.parallelism, axis) for axis in MESH_AXES}
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    training = config.training
    count = training.gradient_accumulation_steps
    rows = f"{training.batch_size} sequences a device" + (f" x {count} microbatches" if count > 1 else "")
    return f"{mesh}, {rows}, gradient_checkpointing {remat_policy(config)}, {attention} attention"
