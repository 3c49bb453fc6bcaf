"""The loop of a run: one pure step after the other, validation and checkpoints at the
boundaries."""

import collections
import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from l1_jax.checkpoint import run_directory
from l1_jax.checkpoint.manifest import CheckpointInfo, Origin
from l1_jax.checkpoint.names import BEST
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.resolve import Resolved
from l1_jax.console import log
from l1_jax.data.batches import Prefetch
from l1_jax.devices.kinds import peak_flops
from l1_jax.devices.processes import gather, together
from l1_jax.errors import RunError
from l1_jax.evaluation.text import Evaluator
from l1_jax.model.flops import count_parameters
from l1_jax.parallel.placement import put_flag
from l1_jax.run import drift, guard
from l1_jax.run.goodput import Goodput
from l1_jax.run.signals import StopSignals
from l1_jax.run.speed import SpeedMeter
from l1_jax.run.tracking import Tracker
from l1_jax.run.watchdog import Watchdog
from l1_jax.storage.remote import display_name
from l1_jax.training.state import TrainState, to_trees


class Life(NamedTuple):
    """What watches a run from its start to its end."""

    signals: StopSignals
    watchdog: Watchdog
    clock: Goodput
    held: ExitStack  # what is given back at the end

    def asked(self) -> bool:
        """Whether this process has got a signal."""
        return self.signals.received is not None


@dataclasses.dataclass
class Run:
    """A run with its state on the devices."""

    config: Resolved
    run_dir: Path
    mesh: Mesh
    info: CheckpointInfo  # of the last step done
    state: TrainState
    train_step: Any  # jitted
    batches: Prefetch
    sources: Callable[[int], list[dict[str, Any]]]  # see TrainingBatches.sources
    evaluator: Evaluator | None
    saver: Saver
    origin: Origin | None = None  # what it came from, if it is a branch
    is_best_void: bool = False  # its best model's loss was measured on something else
    # Names of its step that a kill or damage took: saved before the first step.
    missing: Collection[str] = ()
    stopping: bool = False  # a signal came to one of the processes
    # The row of the last step, where it is none of `logging_steps`.
    unlogged: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether the last step is reached and evaluated, or the patience at its end."""
        patience = self.config.training.early_stopping_patience
        stopped_early = patience is not None and self.info.evaluations_since_best >= patience
        is_over = self.info.step >= self.info.total_steps or stopped_early
        return is_over and not self.info.evaluation_due


def train_steps(run: Run, tracker: Tracker | None, life: Life) -> None:
    """The loop: one pure step after the other, and at the boundaries validation and checkpoints."""
    training, total, clock = run.config.training, run.info.total_steps, life.clock
    # A process says with each batch whether it has got a signal, so that all stop at the same step.
    stop = {asked: {"stop": put_flag(asked, run.mesh)} for asked in (False, True)}
    if run.info.evaluation_due or run.missing or run.finished:
        life.signals.saving()
        due = run.info.evaluation_due
        evaluate_and_save(run, tracker, life, due, due and run.info.step % training.save_steps == 0)
        if run.finished or run.stopping:
            return
        run.saver.wait()
        life.signals.saving(False)
    started = time.perf_counter()
    life.watchdog.expects("compiling the step")
    with clock("compile"):
        train_step = run.train_step.lower(
            run.state, run.batches(run.info.step) | stop[False]
        ).compile()
    clock.write()
    log.info("compiled the step in %.1f s", time.perf_counter() - started)
    meter = SpeedMeter(
        count_parameters(run.config.model, run.state.params), run.config.model, peak_flops(run.mesh)
    )
    # Metrics are fetched one step late, so that an accelerator never waits for the host. CPU
    # devices get one step at a time: with several in flight their collectives starve one another.
    # And before one goes back, or saves the state before a step, no other may be done.
    at_once = training.on_spike == "rewind" or training.on_nonfinite == "skip"
    behind = 0 if run.mesh.devices.flat[0].platform == "cpu" or at_once else 1
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    life.signals.saving()
    with jax.transfer_guard("disallow"), clock("step"):
        for step in range(run.info.step + 1, total + 1):
            life.watchdog.expects(f"step {step}", is_step=True)
            with clock("data_wait"):
                batch = run.batches(step - 1)
            run.state, metrics = train_step(run.state, batch | stop[life.asked()])
            in_flight.append((step, metrics))
            evaluates = step % training.eval_steps == 0 or step == total
            saves = step % training.save_steps == 0
            while len(in_flight) > (0 if evaluates or saves or run.stopping else behind):
                accept(run, tracker, life.clock, meter, *in_flight.popleft())
            if evaluates or saves or run.stopping:
                with meter.paused(), jax.transfer_guard("allow"):
                    evaluate_and_save(run, tracker, life, evaluates, saves)
            if run.finished or run.stopping:
                return


def accept(
    run: Run,
    tracker: Tracker | None,
    clock: Goodput,
    meter: SpeedMeter,
    step: int,
    metrics: dict[str, jax.Array],
) -> None:
    """Fetches and logs the metrics of a step, and counts it as done."""
    values = jax.device_get(metrics)
    suspect = bool(values["spike"] or not (values["finite"] or values["overflow"]))
    if suspect:
        with jax.transfer_guard("allow"):
            respond(run, tracker, clock, step, values)
    elif values["overflow"]:
        log.warning(
            "step %d: the float16 gradient overflowed: no update, and a smaller loss scale", step
        )
    tokens = run.info.tokens + int(values["tokens"])
    run.info = dataclasses.replace(run.info, step=step, tokens=tokens, suspect=suspect)
    meter.tokens += int(values["tokens"])
    run.stopping |= bool(values["stop"])
    if not tracker:
        return
    tracker.advance(step, float(values["loss"]))
    is_logged = (
        step == 1 or step % run.config.training.logging_steps == 0 or step == run.info.total_steps
    )
    row: dict[str, Any] = {
        f"train/{name}": float(values[name]) for name in ("loss", "learning_rate", "grad_norm")
    }
    row |= {"train/tokens": run.info.tokens} | (meter.read() if is_logged else meter.peek())
    row |= {"data/batch_hash": f"{int(values['batch_hash']):08x}"}
    run.unlogged = None if is_logged else row
    if is_logged:
        tracker.log(step, row)


def respond(
    run: Run, tracker: Tracker | None, clock: Goodput, step: int, values: dict[str, Any]
) -> None:
    """Does as configured about a step whose loss jumped, or whose loss or gradient is not finite.
    RunError ends the run: at once, or where too many steps in a row were skipped."""
    training, finite = run.config.training, bool(values["finite"])
    what = f"the loss or gradient of step {step} is not finite"
    if finite:
        what = (
            f"the loss of step {step} jumped to {values['loss']:.4f}, where about "
            f"{values['expected_loss']:.4f} was due"
        )
    if finite and training.on_spike == "warn":
        log.warning("%s", what)
        return
    if not finite:
        guard.check_finite(
            run.state, run.mesh, step
        )  # else no batch is to blame, and no skipping helps
    what, skipped = f"{what}; its update was not applied", int(values["refused"])
    report = guard.make_report(step, values, run.sources(step - 1)) if tracker else {}
    if not finite and (training.on_nonfinite == "stop" or skipped == 1):
        clock.saving(run.info.step)
        bundle = guard.save_bundle(run.saver, run.state, run.info, report)
        again = f"; `resume_from` {display_name(bundle)} does it again" if bundle else ""
        if training.on_nonfinite == "stop":
            raise RunError(what, f"Lower training.learning_rate, or set on_nonfinite: skip{again}")
        what += again
    if tracker:
        tracker.record(report)
        tracker.log(step, {"train/skipped": skipped})
    if skipped >= training.max_skipped_steps:
        raise RunError(
            f"{what}, as those of {skipped} steps in a row",
            "Resume from an older checkpoint, with a lower learning rate",
        )
    rewinds, last = (
        finite and training.on_spike == "rewind",
        (step - 1) // training.save_steps * training.save_steps,
    )
    log.warning("%s", f"{what}; going back to checkpoint-{last}" if rewinds and last else what)
    if rewinds:
        run.saver.wait()
        with together():
            path = run_directory.find_way_back(run.run_dir, run.origin, step, training.save_steps)
            changed = drift.changes(path, run.info, run.config) if path else set()
        if path:
            run.state = guard.go_back(
                run.state, path, keeps_estimate=not changed & drift.TRAINED_ON
            )
        clock.went_back(last)


def evaluate_and_save(
    run: Run, tracker: Tracker | None, life: Life, evaluates: bool, saves: bool
) -> None:
    """Validates, and saves the state under the names that it has earned.

    If a signal is there already, or comes meanwhile, the evaluation is left to the start that
    resumes the run.
    """
    run.unlogged = run.unlogged or run.info.unlogged
    run.info = dataclasses.replace(run.info, evaluation_due=False, unlogged=None)
    names: list[str] = []
    result = None
    if evaluates and run.evaluator and not run.stopping:

        def stop() -> bool:
            life.watchdog.expects(f"the evaluation of step {run.info.step}")
            return life.asked()

        with life.clock("eval"):
            result = dataclasses.replace(run.evaluator, stop=stop)(run.state.params)
    if evaluates and run.evaluator and not result:
        run.stopping = True
        run.info = dataclasses.replace(run.info, evaluation_due=True, unlogged=run.unlogged)
    life.watchdog.expects(f"the save of step {run.info.step}, or of the one before")
    with life.clock("save"):
        is_there = run.saver.wait()
    if not is_there:  # what was to be the best model, perhaps
        best_loss, best_step = json.loads(
            gather(json.dumps(guard.find_best(run.run_dir)))[0]
        )  # as process 0 knows it
        run.info = dataclasses.replace(run.info, best_loss=best_loss, best_step=best_step)
    info = run.info
    if result:
        run.info = dataclasses.replace(info, evaluations_since_best=info.evaluations_since_best + 1)
        # A loss that is not a number is below nothing, so it is never the best.
        if not info.suspect and result.loss < (
            math.inf if info.best_loss is None else info.best_loss
        ):
            run.info = dataclasses.replace(
                info, best_loss=result.loss, best_step=info.step, evaluations_since_best=0
            )
            names = [BEST]
        if tracker:
            if run.finished and run.unlogged:  # stopped early: no step comes after it
                tracker.log(info.step, run.unlogged)
            figures = ("loss", "perplexity", "bits_per_byte")
            tracker.log(info.step, {f"val/{name}": getattr(result, name) for name in figures})
    names = [BEST] if BEST in run.missing else names
    if saves or run.stopping or run.finished or f"checkpoint-{info.step}" in run.missing:
        names = [f"checkpoint-{info.step}", *names]
    run.missing = ()
    if names:
        guard.check_finite(run.state, run.mesh, info.step)
        with life.clock("save"):
            life.clock.saving(info.step)
            run.saver.save(to_trees(run.state), run.info, names)
