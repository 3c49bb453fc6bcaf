"""A plan as text and as figures."""

from typing import Any

from l1_jax.parallel.section import MESH_AXES
from l1_jax.planner.compile import has_libtpu
from l1_jax.planner.estimate import UTILISATION, usable_by_formula
from l1_jax.planner.plan import Plan, describe
from l1_jax.planner.variants import Variant

MOST_RANKED = 12
_HOW = {
    "parameters": "exact, from the shardings",
    "optimizer": "exact, from the shardings",
    "gradients": "formula: as the parameters; twice with accumulation",
    "activations": "by the shapes that jax keeps for the backward pass",
    "logits": "formula",
    "temporaries": "formula: a layer's backward pass, gathered weights",
}


def figures(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, in bytes and seconds, as JSON has them."""
    training = plan.config.training
    found = plan.estimate

    # Where the data decides how long the run is, what follows from it is null too.
    hours = None
    if plan.tokens is not None:
        hours = _seconds_of(plan, plan.tokens) / 3600

    result: dict[str, Any] = {
        "device_kind": plan.kind.name,
        "devices": plan.count,
        "mesh": _mesh(vars(plan.config.parallelism)),
        "precision": training.precision,
        "attention": found.attention,
        "batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "global_batch_size": training.global_batch_size,
        "parameters": plan.num_parameters,
        "flops_per_token": plan.flops_per_token,
        "memory_bytes": found.memory | {"total": found.total_bytes},
        "compiled": plan.compiled._asdict() if plan.compiled else None,
        "usable_bytes": plan.limit_bytes,
        "traffic_bytes": plan.traffic,
        "seconds": plan.seconds | {"step": plan.step_seconds},
        "tokens_per_second": plan.tokens_per_step / plan.step_seconds,
        "steps": plan.steps,
        "tokens": plan.tokens,
        "hours": hours,
        "fits": plan.fits,
        "change": plan.change.changes if plan.change else None,
    }
    if plan.ranking is not None:
        result["ranking"] = [_ranked(plan, variant) for variant in plan.ranking]
    return result


def report(plan: Plan) -> str:
    """The plan for a person to read."""
    lines = _head(plan)
    lines += ["", *_memory(plan)]
    lines += ["", *_traffic(plan)]
    lines += ["", *_time(plan)]
    lines += ["", _verdict(plan)]
    if plan.ranking is not None:
        lines += ["", *_ranking(plan, plan.ranking)]
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    training = plan.config.training
    how = describe(plan.config, plan.estimate.attention)
    sequences = f"{training.global_batch_size} sequences"
    return [
        f"{plan.count} x {plan.kind.name}: {how}, {training.precision}",
        "",
        f"parameters         {plan.num_parameters:,}",
        f"FLOPs per token    {plan.flops_per_token:.3g}",
        f"a step             {sequences}, {plan.tokens_per_step:,} tokens",
    ]


def _memory(plan: Plan) -> list[str]:
    is_tpu = plan.kind.is_tpu
    peak_bytes = plan.compiled.peak_bytes if plan.compiled and _is_by_tpu(plan) else None

    def row(name: str, size: int, note: str) -> str:
        return f"  {name:<14}{_gib(size):>8}  {note}"

    lines = ["memory of a device, GiB"]
    lines += [row(name, size, _HOW[name]) for name, size in plan.estimate.memory.items()]
    lines.append(row("all", plan.estimate.total_bytes, "by these"))
    if peak_bytes:
        lines.append(row("peak", peak_bytes, "the TPU compiler's, which decides"))

    share = "jax's share, XLA_PYTHON_CLIENT_MEM_FRACTION"
    if is_tpu:
        share = "what the compiler allows"
    lines.append(row("usable", plan.limit_bytes, f"of {plan.kind.memory_gib:g}, {share}"))

    if not _is_by_tpu(plan):
        usable = usable_by_formula(plan.limit_bytes)
        lines.append(row("at most", usable, "by formula, with a reserve"))
        if is_tpu:
            why = "libtpu is not installed (docs/planning.md says how)"
            if has_libtpu():
                why = f"no slice of {plan.count} is known here"
            lines.append(f"  The TPU compiler was not asked, for {why}: all by formula.")
    return lines


def _traffic(plan: Plan) -> list[str]:
    compiled = plan.compiled
    is_compiled = compiled is not None and compiled.fits and _is_by_tpu(plan)

    columns = {"by the TPU compiler" if is_compiled else "by formula": plan.traffic}
    if compiled and compiled.compiler == "cpu":
        columns["by the CPU compiler (float32, no reduce-scatter)"] = compiled.traffic

    lines = ["sent by a device in a step, MiB"]
    kinds = {kind for column in columns.values() for kind in column}
    for kind in sorted(kinds):
        cells = [f"{sent.get(kind, 0) / 2**20:10.1f} {how}" for how, sent in columns.items()]
        lines.append(f"  {kind:<19}{'  '.join(cells)}")
    if not kinds:
        lines.append("  nothing")
    return lines


def _seconds_of(plan: Plan, num_tokens: float) -> float:
    """The time of so many tokens, at the speed of the step that is planned."""
    return num_tokens / plan.tokens_per_step * plan.step_seconds


def _time(plan: Plan) -> list[str]:
    parts = [
        f"{plan.seconds[name] * 1e3:.1f} ms {name} at {share:.0%}"
        for name, share in UTILISATION.items()
    ]
    step_ms = plan.step_seconds * 1e3
    rate = plan.tokens_per_step / plan.step_seconds

    if plan.tokens:
        hours = _seconds_of(plan, plan.tokens) / 3600
        end = f"{plan.tokens:,} tokens, {_hours(hours)}"
    else:
        hours = _seconds_of(plan, 1e9) / 3600
        end = f"epochs need data, or set training.max_steps; a billion tokens: {_hours(hours)}"

    return [
        f"step time          {step_ms:.1f} ms: max(compute, memory) + network = {', '.join(parts)}",
        f"tokens per second  {rate:,.0f}",
        f"to the end         {end}",
    ]


def _verdict(plan: Plan) -> str:
    doubt = ""
    if plan.kind.is_tpu and not _is_by_tpu(plan):
        doubt = " (by formula and with its reserve; the TPU compiler may decide otherwise)"
    if plan.fits:
        return f"it fits{doubt}"
    if plan.change is None:
        return (
            f"it does not fit{doubt}, and no mesh of these devices, microbatch or remat makes it "
            "fit: take more devices"
        )

    given = {name: "null" if x is None else x for name, x in plan.change.changes.items()}
    changes = " ".join(f"{name}={value}" for name, value in given.items())
    found = plan.change.estimate
    memory = f"{_gib(found.total_bytes)} GiB"
    if plan.change_compiled and plan.change_compiled.peak_bytes:
        memory = f"{_gib(plan.change_compiled.peak_bytes)} GiB, the TPU compiler's"

    return (
        f"it does not fit{doubt}. The cheapest change that does: {changes}\n"
        f"  ({memory}; {found.step_seconds * 1e3:.1f} ms a step)"
    )


def _ranking(plan: Plan, variants: list[Variant]) -> list[str]:
    rows = [_row(variant) for variant in variants if _fits(plan, variant)]
    lines = [f"legal meshes by step time, by formula: {len(rows)} of {len(variants)} fit"]
    lines += rows[:MOST_RANKED]
    if len(variants) > len(rows[:MOST_RANKED]):
        lines.append("  `json` has the others")
    return lines


def _row(variant: Variant) -> str:
    found = variant.estimate
    how = describe(variant.config, found.attention)
    return f"  {found.step_seconds * 1e3:8.1f} ms {_gib(found.total_bytes):>7} GiB  {how}"


def _ranked(plan: Plan, variant: Variant) -> dict[str, Any]:
    """A row of the ranking as plain values."""
    return {
        "mesh": _mesh(vars(variant.config.parallelism)),
        "batch_size": variant.config.training.batch_size,
        "step_seconds": variant.estimate.step_seconds,
        "memory_bytes": variant.estimate.total_bytes,
        "fits": _fits(plan, variant),
    }


def _fits(plan: Plan, variant: Variant) -> bool:
    return variant.estimate.total_bytes <= usable_by_formula(plan.limit_bytes)


def _is_by_tpu(plan: Plan) -> bool:
    """Whether the TPU compiler was asked."""
    return plan.compiled is not None and plan.compiled.compiler == "tpu"


def _mesh(parallelism: dict[str, Any]) -> dict[str, int]:
    """The sizes of the axes among the keys of the section."""
    return {axis: size for axis, size in parallelism.items() if axis in MESH_AXES}


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
