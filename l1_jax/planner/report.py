"""A plan as text and as figures."""

from typing import Any

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
    """The plan as plain values, in bytes and seconds, for --json."""
    training, compiled = plan.config.training, plan.compiled
    tokens = plan.tokens_per_step
    result: dict[str, Any] = {
        "device_kind": plan.kind.name,
        "devices": plan.count,
        "mesh": {k: v for k, v in vars(plan.config.parallelism).items() if k != "pipeline_microbatches"},
        "precision": training.precision,
        "attention": plan.estimate.attention,
        "batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "global_batch_size": training.global_batch_size,
        "parameters": plan.num_parameters,
        "flops_per_token": plan.flops_per_token,
        "memory_bytes": plan.estimate.memory | {"total": plan.estimate.total_bytes},
        "compiled": compiled and compiled._asdict(),
        "usable_bytes": plan.limit_bytes,
        "traffic_bytes": plan.traffic,
        "seconds": plan.seconds | {"step": plan.step_seconds},
        "tokens_per_second": tokens / plan.step_seconds,
        "steps": plan.steps,
        "tokens": plan.steps and plan.steps * tokens,
        "hours": plan.steps and plan.steps * plan.step_seconds / 3600,
        "fits": plan.fits,
        "change": plan.change and plan.change.changes,
    }
    if plan.ranking is not None:
        result["ranking"] = [_ranked(plan, variant) for variant in plan.ranking]
    return result


def report(plan: Plan) -> str:
    """The plan for a person to read."""
    config, compiled = plan.config, plan.compiled
    by_tpu = compiled is not None and compiled.compiler == "tpu"
    lines = [
        f"{plan.count} x {plan.kind.name}: {describe(config, plan.estimate.attention)}, {config.training.precision}",
        "",
        f"parameters         {plan.num_parameters:,}",
        f"FLOPs per token    {plan.flops_per_token:.3g}",
        f"a step             {config.training.global_batch_size} sequences, {plan.tokens_per_step:,} tokens",
        "",
        "memory of a device, GiB",
    ]
    lines += [f"  {name:<14}{size / 2**30:8.2f}  {_HOW[name]}" for name, size in plan.estimate.memory.items()]
    lines.append(f"  {'all':<14}{_gib(plan.estimate.total_bytes):>8}  by these")
    if by_tpu and compiled and compiled.peak_bytes:
        lines.append(f"  {'peak':<14}{_gib(compiled.peak_bytes):>8}  the TPU compiler's, which decides")
    share = "what the compiler allows" if plan.kind.is_tpu else "jax's share, XLA_PYTHON_CLIENT_MEM_FRACTION"
    lines.append(f"  {'usable':<14}{_gib(plan.limit_bytes):>8}  of {plan.kind.memory_gib:g}, {share}")
    if not by_tpu:
        lines.append(f"  {'at most':<14}{_gib(usable_by_formula(plan.limit_bytes)):>8}  by formula, with a reserve")
    if plan.kind.is_tpu and not by_tpu:
        missing = "libtpu is not installed (docs/planning.md says how)"
        why = f"no slice of {plan.count} is known here" if has_libtpu() else missing
        lines.append(f"  The TPU compiler was not asked, for {why}: all by formula.")
    lines += ["", "sent by a device in a step, MiB"]
    columns = {"by the TPU compiler" if by_tpu and compiled and compiled.fits else "by formula": plan.traffic}
    if compiled and compiled.compiler == "cpu":
        columns["by the CPU compiler (float32, no reduce-scatter)"] = compiled.traffic
    for name in sorted({name for column in columns.values() for name in column}) or ["nothing"]:
        cells = [f"{column.get(name, 0) / 2**20:10.1f} {how}" for how, column in columns.items()]
        lines.append(f"  {name:<19}{'  '.join(cells)}" if name != "nothing" else "  nothing")
    seconds = plan.seconds
    used = ", ".join(f"{seconds[name] * 1e3:.1f} ms {name} at {share:.0%}" for name, share in UTILISATION.items())
    lines += ["", f"step time          {plan.step_seconds * 1e3:.1f} ms: max(compute, memory) + network = {used}"]
    lines.append(f"tokens per second  {plan.tokens_per_step / plan.step_seconds:,.0f}")
    if plan.steps:
        hours = plan.steps * plan.step_seconds / 3600
        lines.append(f"to the end         {plan.steps * plan.tokens_per_step:,} tokens, {_hours(hours)}")
    else:
        billion = 1e9 / plan.tokens_per_step * plan.step_seconds / 3600
        lines.append(
            f"to the end         epochs need data, or set training.max_steps; a billion tokens: {_hours(billion)}"
        )
    lines += ["", _verdict(plan)]
    if plan.ranking is not None:
        rows = [_row(variant) for variant in plan.ranking if _ranked(plan, variant)["fits"]]
        lines += ["", f"legal meshes by step time, by formula: {len(rows)} of {len(plan.ranking)} fit"]
        lines += rows[:MOST_RANKED] + ["  --json has the others"] * (len(plan.ranking) > len(rows[:MOST_RANKED]))
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    by_formula = plan.kind.is_tpu and not (plan.compiled and plan.compiled.compiler == "tpu")
    doubt = " (by formula and with its reserve; the TPU compiler may decide otherwise)" if by_formula else ""
    if plan.fits:
        return f"it fits{doubt}"
    if plan.change is None:
        return (
            f"it does not fit{doubt}, and no mesh of these devices, microbatch or remat makes it fit: take more devices"
        )
    changes = " ".join(f"{name}={value}" for name, value in plan.change.changes.items())
    peak = plan.change_compiled.peak_bytes if plan.change_compiled else None
    memory = f"{_gib(peak)} GiB, the TPU compiler's" if peak else f"{_gib(plan.change.estimate.total_bytes)} GiB"
    step = plan.change.estimate.step_seconds
    return f"it does not fit{doubt}. The cheapest change that does: {changes}\n  ({memory}; {step * 1e3:.1f} ms a step)"


def _ranked(plan: Plan, variant: Variant) -> dict[str, Any]:
    found, training = variant.estimate, variant.config.training
    return {
        "mesh": {k: v for k, v in vars(variant.config.parallelism).items() if k != "pipeline_microbatches"},
        "batch_size": training.batch_size,
        "step_seconds": found.step_seconds,
        "memory_bytes": found.total_bytes,
        "fits": found.total_bytes <= usable_by_formula(plan.limit_bytes),
    }


def _row(variant: Variant) -> str:
    found = variant.estimate
    what = describe(variant.config, found.attention)
    return f"  {found.step_seconds * 1e3:8.1f} ms {_gib(found.total_bytes):>7} GiB  {what}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
