"""What is done about a step that cannot be trusted.

A report of it, a state from which it can be done again, and the way back.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l1_jax.checkpoint.manifest import CheckpointInfo, read_info
from l1_jax.checkpoint.names import BEST, REPORT_FILE, bundle_name, is_checkpoint
from l1_jax.checkpoint.saver import Saver
from l1_jax.console import log
from l1_jax.errors import RunError, UserError
from l1_jax.parallel.sharding import named
from l1_jax.training.initial import restore_state
from l1_jax.training.state import TrainState, to_trees


def _is_finite(x: jax.Array, zero: jax.Array) -> jax.Array:
    """Whether all of an array is.

    Its products with zero are zeros, and else NaN. On CPU a matrix product takes a third of the
    time of `isfinite` and a reduction (benchmarks/RESULTS.md).

    Args:
        x: of any shape.
        zero: 0.0, which XLA must not know.
    """
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.bool_(True)
    if x.ndim == 0 or jax.default_backend() != "cpu":
        return jnp.isfinite(x).all()

    zeros = jnp.broadcast_to(zero, x.shape[-1:])
    return jnp.isfinite(jnp.dot(x, zeros, precision="highest")).all()


@functools.cache
def _are_finite(mesh: Mesh) -> Any:
    return jax.jit(
        lambda tree, zero: jax.tree.map(lambda x: _is_finite(x, zero), tree),
        out_shardings=named(mesh),
    )


def check_finite(state: TrainState, mesh: Mesh, step: int) -> None:
    """Checks that all parameters and moments are finite. Every process has to call this.

    Raises:
        RunError: an array is not; the message names it.
    """
    trees = {
        "params": state.params,
        "held": state.held,
        "beside": state.beside,
        "opt_state": state.opt_state,
    }
    found = jax.device_get(_are_finite(mesh)(trees, 0.0))

    for path, is_finite in jax.tree_util.tree_leaves_with_path(found):
        if is_finite:
            continue

        name = jax.tree_util.keystr(path, simple=True, separator=".")
        what = (
            f"{name} holds numbers that are not finite at step {step}; nothing of this "
            "step was saved"
        )
        remedy = (
            "Resume from the newest checkpoint; if it comes again, lower the learning "
            "rate or suspect the device"
        )
        raise RunError(what, remedy)


def make_report(step: int, values: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is to be known of a refused step, for JSON.

    Args:
        step: its number.
        values: its metrics.
        rows: the sources of its batch.
    """
    report: dict[str, Any] = {"step": step}
    for name in ("loss", "expected_loss", "grad_norm"):
        number = float(values[name])
        # JSON has no numbers that are not finite.
        report[name] = number if math.isfinite(number) else str(number)

    report["batch_hash"] = f"{int(values['batch_hash']):08x}"
    report["rows"] = rows
    return report


def find_best(run_dir: Path) -> tuple[float | None, int | None]:
    """Loss and step of the best model that is there."""
    best = run_dir / BEST
    if not is_checkpoint(best):
        return None, None

    info = read_info(best)
    return info.best_loss, info.best_step


def save_bundle(
    saver: Saver, state: TrainState, info: CheckpointInfo, report: dict[str, Any]
) -> Path | None:
    """Saves the state before the step after `info.step`, with a report.

    Returns:
        The checkpoint, `nonfinite-<that step>`. None where that fails, which is said: it is not
        what ends the run.
    """
    name = bundle_name(info.step + 1)
    extras = {REPORT_FILE: json.dumps(report) + "\n"}

    # As if the step had not been tried. Arithmetic keeps where the arrays lie.
    health = dataclasses.replace(state.health, refused=state.health.refused * 0)
    before = dataclasses.replace(state, health=health, step=state.step * 0 + info.step)

    try:
        saver.save(to_trees(before), info, [name], extras)
        if saver.wait():
            return saver.run_dir / name
    except UserError as error:
        log.error("%s", error)
    return None


def forget_estimate(state: TrainState) -> TrainState:
    """`state` as if no loss had been seen yet: what is trained on now has other losses."""
    return dataclasses.replace(state, health=jax.tree.map(lambda x: x * 0, state.health))


def go_back(state: TrainState, path: Path, *, keeps_estimate: bool) -> TrainState:
    """`state` with the parameters, the moments and the estimate of the loss of a checkpoint.

    Args:
        state: of now; its arrays are deleted.
        path: of the checkpoint.
        keeps_estimate: to be False where the checkpoint was trained on something else.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )

    # There may be no room for two.
    for leaf in jax.tree.leaves((state.params, state.held, state.opt_state, state.beside)):
        leaf.delete()

    restored = restore_state(path, abstract)
    if not keeps_estimate:
        restored = forget_estimate(restored)

    return dataclasses.replace(
        restored,
        step=state.step,
        loss_scale=state.loss_scale,
        health=dataclasses.replace(restored.health, refused=state.health.refused),
    )
