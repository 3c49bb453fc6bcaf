"""A run from its config to its last checkpoint: the one module that knows all the others."""

import contextlib
import dataclasses
from collections.abc import Collection
from typing import Any

import jax

from l1_jax import __version__
from l1_jax.checkpoint.names import BEST, CONFIG_FILE
from l1_jax.checkpoint.run_directory import find_saved
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import dump_config
from l1_jax.console import EXIT_OK, EXIT_STOPPED, console, log
from l1_jax.devices.processes import from_main, is_main, together
from l1_jax.errors import RunError, memory_errors
from l1_jax.model.flops import count_parameters
from l1_jax.run import drift
from l1_jax.run.goodput import Goodput
from l1_jax.run.loop import Life, Run, train_steps
from l1_jax.run.setup import set_up
from l1_jax.run.signals import StopSignals
from l1_jax.run.start import BatchSizeChooser, Request, Start, check_request, look_around
from l1_jax.run.tracking import Tracker
from l1_jax.run.watchdog import Watchdog
from l1_jax.storage.files import write_text
from l1_jax.storage.remote import display_name

_LESS_MEMORY = (
    "Lower training.batch_size or model.max_seq_length, "
    "or set training.gradient_checkpointing: true"
)


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
    choose_batch_size: BatchSizeChooser | None = None,
) -> int:
    """Trains as `config` says.

    Args:
        config: of the run.
        resume: go on with the run in `training.output_dir`, if there is one.
        resume_from: the checkpoint, or the run, to go on from instead; `resume` is implied.
        overwrite: replace the run that is there.
        allow_change: what may differ from the resumed run, though it makes it another one.
        choose_batch_size: what decides where `training.batch_size` is auto.

    Returns:
        The exit code: 0 done, 75 stopped by a signal after saving.

    Raises:
        UserError: the config, the data or the directory does not allow it; nothing is written.
        RunError: the loss was not finite, or the memory too small.
    """
    if isinstance(allow_change, str):
        allow_change = [allow_change]

    request = Request(
        config=config,
        resume=resume or resume_from is not None,
        resume_from=resume_from,
        overwrite=overwrite,
        allow_change=allow_change,
        choose_batch_size=choose_batch_size,
    )
    check_request(request)
    drift.check_names(allow_change)

    with memory_errors(_LESS_MEMORY), contextlib.ExitStack() as cleanup:
        signals = cleanup.enter_context(StopSignals(config.training.grace_seconds))
        watchdog = cleanup.enter_context(Watchdog(config.training.hang_timeout_seconds))
        life = Life(signals, watchdog, Goodput(), cleanup)

        start = look_around(request)

        with jax.set_mesh(start.mesh), _lost_processes():
            run = set_up(start)

            if run.finished and not run.missing and not start.resumed.damaged:
                steps = f"step {run.info.step} of {run.info.total_steps}"
                console.print(f"nothing left to do: the run ended at {steps}")
                return EXIT_OK

            tracker = take_directory(run, start, life)
            announce(run)
            run_to_end(run, tracker, life)
            return conclude(run, life)


@contextlib.contextmanager
def _lost_processes():
    """Says what it means that the connection to another process broke."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "Gloo" not in str(error) and "NCCL" not in str(error):
            raise

        said = str(error).splitlines()[0]
        remedy = "See what it said, and run the same command again, with `resume`"
        raise RunError(f"another process of the job has ended ({said})", remedy) from error


def take_directory(run: Run, start: Start, life: Life) -> Tracker | None:
    """Makes the directory the run's own: from here on something is written. Returns what tracks the
    run, in the main process."""
    home = start.home
    tracker = None
    start_id = ""

    with together():
        if is_main():
            life.cleanup.enter_context(home.lock())

            if start.request.overwrite:
                home.clear()

            facts, before = home.take(
                run.info, describe(run), start.resumed.damaged, is_best_void=run.is_best_void
            )
            start_id = facts["start"]

            life.clock.begin(
                home.run_file,
                facts,
                before=before.get("goodput", {}),
                step=run.info.step,
                alive=home.last_alive,
            )
            life.cleanup.callback(life.clock.write)
            write_text(home.path / CONFIG_FILE, dump_config(run.config))

            if home.mirror:
                home.mirror.take(start_id)

            tracker = Tracker(home.path, run.config, run.info.step, facts["run_id"])

    with together():
        home.join(from_main(start_id))

    # The main process knows: without a common disk the others have not seen a rewind.
    best = (run.info.best_step, home.path / BEST)
    is_there = from_main(best in find_saved(home.path))

    if not is_there and BEST not in run.missing:
        run.info = dataclasses.replace(
            run.info, best_loss=None, best_step=None, evaluations_since_best=0
        )

    return tracker


def describe(run: Run) -> dict[str, Any]:
    """What run.json says of a start."""
    facts = {
        "l1_jax": __version__,
        "jax": jax.__version__,
        "devices": _devices(run),
        "processes": jax.process_count(),
        "mesh": dict(run.mesh.shape),
        "parameters": count_parameters(run.config.model, run.state.weights),
        "data_hash": run.info.data_hash,
    }

    origins = {name: dataclasses.asdict(origin) for name, origin in run.origins.items()}
    return facts | origins


def _devices(run: Run) -> str:
    return f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"


def announce(run: Run) -> None:
    """Says what is about to run, and on what."""
    config = run.config
    precision = config.training.precision
    sizes = ", ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1)

    num_parameters = count_parameters(config.model, run.state.weights)
    where = f"{_devices(run)} ({sizes})" if sizes else _devices(run)
    steps = f"steps {run.info.step + 1} to {run.info.total_steps}"
    if run.finished:
        steps = f"step {run.info.step} again"
    batch = f"{run.info.global_batch_size} sequences of {config.model.max_seq_length} tokens"
    console.print(f"{num_parameters:,} parameters in {precision} on {where}; {steps} of {batch}")

    if run.state.held:
        num_trained = count_parameters(config.model, run.state.params)
        log.info("%s of them are trained, the others are frozen", f"{num_trained:,}")

    why = f" ({run.attention.why})" if run.attention.why else ""
    log.info("attention: %s%s", run.attention.name, why)

    if precision != "float32" and run.mesh.devices.flat[0].platform == "cpu":
        log.warning("training.precision is %s, which is slower than float32 on a CPU", precision)


def run_to_end(run: Run, tracker: Tracker | None, life: Life) -> None:
    """Trains, and leaves the run with the last step evaluated and saved."""
    # Whatever ends the run, a save that is under way is finished.
    with (
        life.clock("save"),
        contextlib.closing(run.batches),
        run.saver,
        tracker or contextlib.nullcontext(),
    ):
        train_steps(run, tracker, life)

        life.watchdog.expects("the last save")
        life.clock.write()  # before the saver's last upload

        if run.finished and run.saver.wait():
            life.signals.finished()  # what is left is to close files


def conclude(run: Run, life: Life) -> int:
    """Says how the run ended; returns the exit code."""
    info = run.info
    place = display_name(run.run_dir)
    console.print(
        f"step {info.step} of {info.total_steps}, {info.tokens:,} tokens; saved in {place}"
    )

    if info.best_loss is not None:
        best = f"best validation loss {info.best_loss:.4f}, step {info.best_step}"
        console.print(f"{best}: {display_name(run.run_dir / BEST)}")

    if not run.finished:
        console.print("stopped by a signal")
    elif info.step < info.total_steps:
        count = info.evaluations_since_best
        console.print(f"stopped early: {count} validations without a better loss (the patience)")

    console.print(life.clock)
    return EXIT_OK if run.finished else EXIT_STOPPED
