"""The loop of a run: one pure step after the other, with validation and saves at boundaries."""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from l1_jax.checkpoint.manifest import CheckpointInfo, Origin
from l1_jax.checkpoint.names import BEST, step_name
from l1_jax.checkpoint.resuming import find_way_back
from l1_jax.checkpoint.run_directory import ORIGIN
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.resolve import Resolved, ResolvedTraining
from l1_jax.console import log
from l1_jax.data.batches import Prefetch
from l1_jax.devices.kinds import peak_flops
from l1_jax.devices.processes import from_main, together
from l1_jax.errors import RunError
from l1_jax.evaluation.text import Evaluation, Evaluator
from l1_jax.model.backends import Backend
from l1_jax.model.flops import count_frozen, count_parameters, flops_per_token
from l1_jax.parallel.placement import put_flag
from l1_jax.run import drift, guard
from l1_jax.run.goodput import Goodput
from l1_jax.run.signals import StopSignals
from l1_jax.run.speed import SpeedMeter
from l1_jax.run.tracking import Tracker
from l1_jax.run.watchdog import Watchdog
from l1_jax.storage.remote import display_name
from l1_jax.training.state import TrainState, Tree, to_trees


class Life(NamedTuple):
    """What watches a run from its start to its end."""

    signals: StopSignals
    watchdog: Watchdog
    clock: Goodput
    cleanup: ExitStack  # what is given back at the end

    def asked(self) -> bool:
        """Whether this process has got a signal."""
        return self.signals.received is not None


@dataclasses.dataclass
class Run:
    """A run with its state on the devices."""

    config: Resolved
    run_dir: Path
    mesh: Mesh
    attention: Backend
    info: CheckpointInfo  # of the last step done
    state: TrainState

    borrowed: Tree  # other models' arrays
    train_step: Any  # jitted
    batches: Prefetch
    where: Callable[[int], list[dict[str, Any]]]  # see TrainingBatches.where
    evaluator: Evaluator | None
    saver: Saver

    # The other runs' checkpoints that it came from, as run.json calls them.
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)

    # Its best model's loss was measured on something else.
    is_best_void: bool = False

    # Names of its step that a kill or damage took: saved before the first step.
    missing: Collection[str] = ()

    # A signal came to one of the processes.
    stopping: bool = False

    # The row of the last step, where it is none of `logging_steps`.
    unlogged: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether no step is left to do."""
        return is_finished(self.info, self.config.training)


def is_finished(info: CheckpointInfo, training: ResolvedTraining) -> bool:
    """Whether the last step is reached and evaluated, or the patience at its end."""
    patience = training.early_stopping_patience
    stopped_early = patience is not None and info.evaluations_since_best >= patience
    is_over = info.step >= info.total_steps or stopped_early
    return is_over and not info.evaluation_due


def train_steps(run: Run, tracker: Tracker | None, life: Life) -> None:
    """The loop: one pure step after the other, and at the boundaries validation and checkpoints."""
    training = run.config.training

    if run.info.evaluation_due or run.missing or run.finished:
        catch_up(run, tracker, life)

        if run.finished or run.stopping:
            return

    # A process says with each batch whether it has got a signal, so that all stop at the same step.
    stop_flags = {asked: put_flag(asked, run.mesh) for asked in (False, True)}

    train_step = compile_step(run, stop_flags[False], life)
    meter = make_meter(run)

    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    most_in_flight = count_in_flight(run)

    life.signals.saving()

    with jax.transfer_guard("disallow"), life.clock("step"):
        for step in range(run.info.step + 1, run.info.total_steps + 1):
            life.watchdog.expects(f"step {step}", is_step=True)

            with life.clock("data_wait"):
                batch = run.batches(step - 1)

            batch["stop"] = stop_flags[life.asked()]
            run.state, metrics = train_step(run.state, run.borrowed, batch)
            in_flight.append((step, metrics))

            evaluates = step % training.eval_steps == 0 or step == run.info.total_steps
            saves = step % training.save_steps == 0

            # What is accepted may say that the run stops: then nothing may stay in flight.
            while len(in_flight) > (0 if evaluates or saves or run.stopping else most_in_flight):
                done, metrics = in_flight.popleft()
                accept(run, tracker, life.clock, meter, step=done, metrics=metrics)

            if evaluates or saves or run.stopping:
                with meter.paused(), jax.transfer_guard("allow"):
                    evaluate_and_save(run, tracker, life, evaluates=evaluates, saves=saves)

            if run.finished or run.stopping:
                return


def catch_up(run: Run, tracker: Tracker | None, life: Life) -> None:
    """Does what a signal or a kill left to be done of the step from which the run goes on."""
    life.signals.saving()

    # The signal came before the evaluation, and the save that was due at the same step has not been
    # made. After a kill `run.missing` says what is to be saved.
    was_left = run.info.evaluation_due
    is_due = run.info.step % run.config.training.save_steps == 0
    evaluate_and_save(run, tracker, life, evaluates=was_left, saves=was_left and is_due)

    if run.finished or run.stopping:
        return

    run.saver.wait()
    life.signals.saving(False)


def compile_step(run: Run, stop_flag: jax.Array, life: Life) -> Any:
    """The train step, compiled for the batches of this run and such a flag."""
    started = time.perf_counter()
    life.watchdog.expects("compiling the step")

    with life.clock("compile"):
        batch = run.batches(run.info.step) | {"stop": stop_flag}
        compiled = run.train_step.lower(run.state, run.borrowed, batch).compile()

    life.clock.write()
    log.info("compiled the step in %.1f s", time.perf_counter() - started)
    return compiled


def make_meter(run: Run) -> SpeedMeter:
    """What counts tokens and floating-point operations per second."""
    model = run.config.model
    num_parameters = count_parameters(model, run.state.weights)
    frozen = count_frozen(model, run.state.params, run.state.held)
    return SpeedMeter(flops_per_token(num_parameters, model, frozen), peak_flops(run.mesh))


def count_in_flight(run: Run) -> int:
    """How many steps may be on the devices while their metrics have not been fetched.

    Metrics are fetched one step late, so that an accelerator never waits for the host. CPU devices
    get one step at a time: with several in flight their collectives starve one another. And before
    one goes back, or saves the state before a step, no other may be done.
    """
    training = run.config.training

    if training.on_spike == "rewind" or training.on_nonfinite == "skip":
        return 0

    return 0 if run.mesh.devices.flat[0].platform == "cpu" else 1


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

    is_bad = not (values["finite"] or values["overflow"])
    suspect = bool(values["spike"] or is_bad)

    if suspect:
        with jax.transfer_guard("allow"):
            respond(run, tracker, clock, step, values)
    elif values["overflow"]:
        message = "step %d: the float16 gradient overflowed: no update, and a smaller loss scale"
        log.warning(message, step)

    num_tokens = int(values["tokens"])
    tokens = run.info.tokens + num_tokens
    run.info = dataclasses.replace(run.info, step=step, tokens=tokens, suspect=suspect)
    run.stopping |= bool(values["stop"])
    meter.tokens += num_tokens

    if tracker:
        tracker.advance(step, float(values["loss"]))
        log_step(run, tracker, meter, values)


def log_step(run: Run, tracker: Tracker, meter: SpeedMeter, values: dict[str, Any]) -> None:
    """Logs the row of the last step, or keeps it where it is none of `logging_steps`."""
    step = run.info.step
    is_due = step % run.config.training.logging_steps == 0
    is_logged = is_due or step == 1 or step == run.info.total_steps

    row: dict[str, Any] = {}
    for name in ("loss", "learning_rate", "grad_norm"):
        row[f"train/{name}"] = float(values[name])

    for name, value in values["terms"].items():
        row[f"train/{name}"] = float(value)

    row["train/tokens"] = run.info.tokens
    row |= meter.read() if is_logged else meter.peek()
    row["data/batch_hash"] = f"{int(values['batch_hash']):08x}"

    run.unlogged = None if is_logged else row
    if is_logged:
        tracker.log(step, row)


def respond(
    run: Run, tracker: Tracker | None, clock: Goodput, step: int, values: dict[str, Any]
) -> None:
    """Does as configured about a step whose loss jumped, or whose loss or gradient is not finite.

    Raises:
        RunError: the run ends: at once, or because too many steps in a row were skipped.
    """
    training = run.config.training
    is_finite = bool(values["finite"])
    what = describe_fault(step, values)

    if is_finite and training.on_spike == "warn":
        log.warning("%s", what)
        return

    if not is_finite:
        # Else no batch is to blame, and no skipping helps.
        guard.check_finite(run.state, run.mesh, step)

    what += "; its update was not applied"
    skipped = int(values["refused"])
    report = guard.make_report(step, values, run.where(step - 1)) if tracker else {}

    if not is_finite and training.on_nonfinite == "stop":
        again = keep_bundle(run, clock, report)
        raise RunError(what, f"Lower training.learning_rate, or set on_nonfinite: skip{again}")

    # Of several in a row the first: the others come from the same state.
    if not is_finite and skipped == 1:
        what += keep_bundle(run, clock, report)

    if tracker:
        tracker.record(report)
        tracker.log(step, {"train/skipped": skipped})

    if skipped >= training.max_skipped_steps:
        remedy = "Resume from an older checkpoint, with a lower learning rate"
        raise RunError(f"{what}, as those of {skipped} steps in a row", remedy)

    if is_finite and training.on_spike == "rewind":
        go_back(run, clock, step, what)
    else:
        log.warning("%s", what)


def describe_fault(step: int, values: dict[str, Any]) -> str:
    """What is wrong with a step, by its metrics."""
    if not values["finite"]:
        return f"the loss or gradient of step {step} is not finite"

    due = f"where about {values['expected_loss']:.4f} was due"
    return f"the loss of step {step} jumped to {values['loss']:.4f}, {due}"


def keep_bundle(run: Run, clock: Goodput, report: dict[str, Any]) -> str:
    """Saves what is needed to do a step again; returns the end of a sentence that says how."""
    clock.saving(run.info.step)
    bundle = guard.save_bundle(run.saver, run.state, run.info, report)
    return f"; `resume_from` {display_name(bundle)} does it again" if bundle else ""


def go_back(run: Run, clock: Goodput, step: int, what: str) -> None:
    """Gives the run the parameters and moments of the last checkpoint before `step`. Before its
    first checkpoint there is none, and it keeps its own.

    Raises:
        RunError: that checkpoint cannot be used.
    """
    save_steps = run.config.training.save_steps
    last = (step - 1) // save_steps * save_steps
    log.warning("%s", f"{what}; going back to {step_name(last)}" if last else what)

    run.saver.wait()

    with together():
        path = find_way_back(run.run_dir, run.origins.get(ORIGIN), step, save_steps)
        changed = drift.changes(path, run.info, run.config) if path else set()

    if path:
        keeps_estimate = not changed & drift.TRAINED_ON
        run.state = guard.go_back(run.state, path, keeps_estimate=keeps_estimate)

    clock.went_back(last)


def evaluate_and_save(
    run: Run, tracker: Tracker | None, life: Life, *, evaluates: bool, saves: bool
) -> None:
    """Validates, and saves the state under the names that it has earned.

    If a signal is there already, or comes meanwhile, the evaluation is left to the start that
    resumes the run.
    """
    run.unlogged = run.unlogged or run.info.unlogged
    run.info = dataclasses.replace(run.info, evaluation_due=False, unlogged=None)
    result = None

    if evaluates and run.evaluator:
        if not run.stopping:
            result = evaluate(run, run.evaluator, life)

        if result is None:
            run.stopping = True
            run.info = dataclasses.replace(run.info, evaluation_due=True, unlogged=run.unlogged)

    wait_for_save(run, life)
    is_best = result is not None and count_evaluation(run, result)

    if result and tracker:
        log_evaluation(run, tracker, result)

    names = names_earned(run, saves=saves, is_best=is_best)
    run.missing = ()

    if names:
        guard.check_finite(run.state, run.mesh, run.info.step)

        with life.clock("save"):
            life.clock.saving(run.info.step)
            run.saver.save(to_trees(run.state), run.info, names)


def evaluate(run: Run, evaluator: Evaluator, life: Life) -> Evaluation | None:
    """The loss on the validation split; None where a signal came first."""

    def stop() -> bool:
        life.watchdog.expects(f"the evaluation of step {run.info.step}")
        return life.asked()

    with life.clock("eval"):
        return dataclasses.replace(evaluator, stop=stop)(run.state.evaluated, run.borrowed)


def wait_for_save(run: Run, life: Life) -> None:
    """Waits for the save under way. If it failed, what was to be the best model is not there."""
    life.watchdog.expects(f"the save of step {run.info.step}, or of the one before")

    with life.clock("save"):
        is_there = run.saver.wait()

    if not is_there:
        best_loss, best_step = from_main(guard.find_best(run.run_dir))
        run.info = dataclasses.replace(run.info, best_loss=best_loss, best_step=best_step)


def count_evaluation(run: Run, result: Evaluation) -> bool:
    """Counts an evaluation; returns whether it is the best so far."""
    info = run.info
    least = math.inf if info.best_loss is None else info.best_loss

    # A loss that is not a number is below nothing, so it is never the best.
    is_best = result.loss < least and not info.suspect

    if is_best:
        run.info = dataclasses.replace(
            info, best_loss=result.loss, best_step=info.step, evaluations_since_best=0
        )
    else:
        count = info.evaluations_since_best + 1
        run.info = dataclasses.replace(info, evaluations_since_best=count)

    return is_best


def log_evaluation(run: Run, tracker: Tracker, result: Evaluation) -> None:
    """Logs the row of an evaluation."""
    # Stopped early: no step comes after this one, whose row would be lost.
    if run.finished and run.unlogged:
        tracker.log(run.info.step, run.unlogged)

    row: dict[str, Any] = {f"val/{name}": value for name, value in result.metrics().items()}
    tracker.log(run.info.step, row)


def names_earned(run: Run, *, saves: bool, is_best: bool) -> list[str]:
    """The names under which the state is to be saved now."""
    own = step_name(run.info.step)
    names = []

    if saves or run.stopping or run.finished or own in run.missing:
        names.append(own)

    if is_best or BEST in run.missing:
        names.append(BEST)

    return names
