"""A run from its config to its last checkpoint: the one module that knows all the others."""

import contextlib
import dataclasses
import functools
from collections.abc import Collection
from pathlib import Path

import jax
from jax.sharding import Mesh

from l1_jax import __version__
from l1_jax.checkpoint import run_directory
from l1_jax.checkpoint.mirror import Mirror
from l1_jax.checkpoint.names import BEST, CONFIG_FILE, FILES, RUN_FILE, TOKENIZER_FILE
from l1_jax.checkpoint.restore import CheckpointInfo, read_info, restore_state
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import dump_config
from l1_jax.console import EXIT_OK, EXIT_STOPPED, console, log
from l1_jax.data.batches import Prefetch, TrainingBatches
from l1_jax.data.store import FOR_TRAINING, Prepared
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.devices.compiled import keep_compiled
from l1_jax.devices.memory import memory_limit
from l1_jax.devices.processes import check_equal, gather, is_main, together
from l1_jax.devices.select import keep_freed_memory, make_deterministic, select_devices
from l1_jax.errors import RunError, UserError, check_writable, memory_errors
from l1_jax.evaluation.text import Evaluator
from l1_jax.model.backends import choose_attention
from l1_jax.model.flops import count_parameters
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import process_rows, put_batch
from l1_jax.parallel.sharding import named
from l1_jax.planner.variants import resolve_auto
from l1_jax.run import drift, guard
from l1_jax.run.goodput import Goodput
from l1_jax.run.loop import Life, Run, train_steps
from l1_jax.run.signals import StopSignals
from l1_jax.run.tracking import Tracker, check_wandb
from l1_jax.run.watchdog import Watchdog
from l1_jax.storage.files import write_text
from l1_jax.storage.remote import display_name, is_url
from l1_jax.training.program import make_program
from l1_jax.training.step import make_eval_step


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
) -> int:
    """Trains as `config` says. The flags are those of scripts/train.py; `resume_from` is the path given with --resume.

    Returns the exit code: 0 done, 75 stopped by a signal after saving. UserError where the config, the data or the
    directory does not allow it, with nothing written; RunError where the loss was not finite or the memory too small.
    """
    remedy = "Lower training.batch_size or model.max_seq_length, or set training.gradient_checkpointing: true"
    with memory_errors(remedy), contextlib.ExitStack() as held:
        signals = held.enter_context(StopSignals(config.training.grace_seconds))
        watchdog = held.enter_context(Watchdog(config.training.hang_timeout_seconds))
        return _train(config, Life(signals, watchdog, Goodput(), held), resume, resume_from, overwrite, allow_change)


def _train(
    config: Config, life: Life, resume: bool, resume_from: str | None, overwrite: bool, allow_change: Collection[str]
) -> int:
    output = config.training.output_dir
    with together():
        drift.check_names(allow_change)
        if config.training.deterministic:
            make_deterministic()
        mirror = Mirror(output, FILES) if is_url(output) else None
        run_dir = mirror.home if mirror else Path(output)
        check_writable(run_dir, "training.output_dir")
        run_directory.check_files(run_dir, resume)
        if not resume:
            run_directory.check_free(run_dir, overwrite)
        check_wandb(config.training)
        prepared = Prepared.open(config.data.path)
        if config.training.device in ("auto", "cpu"):
            keep_freed_memory()
        mesh = create_mesh(config.parallelism, devices := select_devices(config.training.device))
        keep_compiled(devices)
        # On a common disk each process hashes a share; from object storage each has a copy of its own.
        share = (0, 1) if is_url(config.data.path) else (jax.process_index(), jax.process_count())
        prepared.check(FOR_TRAINING, share)
        if mirror and jax.process_count() > 1 and config.training.on_spike == "rewind":
            what = "training.on_spike is rewind, which several processes cannot do with a run in object storage"
            raise UserError(what, "Set it to skip, or training.output_dir to a directory that all share")
        seen = run_directory.stamp(run_dir)
    last_alive = run_directory.mend(run_dir, seen) if resume and not mirror else None
    found, damaged = run_directory.find_resumed(run_dir, resume_from) if resume else (None, [])
    try:
        with jax.set_mesh(mesh):
            run = set_up(config, prepared, mesh, run_dir, found, mirror, allow_change)
            run.origin = run_directory.origin_of(run_dir, found)
            is_due = run.finished or run.info.step % config.training.save_steps == 0
            run.missing = run_directory.missing(run_dir, run.info, found, damaged, is_due)
            if run.finished and not run.missing and not damaged:
                life.signals.finished()
                console.print(f"nothing left to do: the run ended at step {run.info.step} of {run.info.total_steps}")
                return EXIT_OK
            return run_to_end(run, life, overwrite, seen, damaged, last_alive)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "Gloo" in str(error) or "NCCL" in str(error):
            remedy = "See what it said, and run the same command again, with --resume"
            raise RunError(f"another process of the job has ended ({str(error).splitlines()[0]})", remedy) from error
        raise


def set_up(
    config: Config,
    prepared: Prepared,
    mesh: Mesh,
    run_dir: Path,
    resumed: Path | None,
    mirror: Mirror | None,
    allow_change: Collection[str] = (),
) -> Run:
    """Resolves the config, makes or restores the state, builds the functions. Writes nothing."""
    memory = min(int(limit) for limit in gather(str(memory_limit(mesh))))  # asked by all, before one may stop
    with together():
        tokenizer = Tokenizer.load(prepared.tokenizer_path)
        stream, validation = prepared.store("train").tokens, prepared.store("val")
        previous = read_info(resumed) if resumed else None
        resumed_batch = previous.global_batch_size if previous else None
        config = resolve_auto(config, tokenizer.vocab_size, len(stream), mesh, resumed_batch, memory)
        check_divisible(config.model, mesh)
        training, length = config.training, config.model.max_seq_length
        batch_size = training.global_batch_size
        assert batch_size and isinstance(training.batch_size, int) and training.max_steps  # noqa: PT018, resolved
        facts = (prepared.documents_mode, prepared.data_hash, tokenizer.sha256)
        info = CheckpointInfo(batch_size, training.max_steps, *facts)
        changed: set[str] = set()
        if resumed and previous:
            changed = drift.check(resumed, previous, info, config, allow_change)
            changeable = ("total_steps", "documents", "data_hash", "tokenizer_sha256")
            info = dataclasses.replace(previous, **{name: getattr(info, name) for name in changeable})

    is_best_void = bool(changed & drift.MEASURE)
    if is_best_void:
        if info.best_loss is not None:
            best = f"the best validation loss so far, {info.best_loss:.4f} of step {info.best_step}"
            names = ", ".join(sorted(changed & drift.MEASURE))
            log.warning("%s, was measured with another value of %s: it counts no more", best, names)
        info = dataclasses.replace(info, best_loss=None, best_step=None, evaluations_since_best=0)

    keys = {f"{name}.{key}": value for name, section in vars(config).items() for key, value in vars(section).items()}
    check_equal(keys | {"the prepared data": info.data_hash, "the checkpoint to resume": info.step})

    program = make_program(config, mesh)
    state = restore_state(resumed, program.abstract) if resumed else program.create()
    if changed & drift.TRAINED_ON:
        state = guard.forget_estimate(state)

    eot_id = tokenizer.eot_id if config.data.document_mask else None
    batches, rows = TrainingBatches(stream, length, batch_size, training.seed, eot_id), process_rows(mesh, batch_size)
    if not validation.num_documents:
        log.warning("the validation split is empty: no validation, no early stopping and no best_model in this run")
    eval_step = jax.jit(make_eval_step(program.eval_graphdef), out_shardings=named(mesh))
    rows_at_a_time = training.batch_size * Layout.of(mesh).rows
    # Counted in global batches, so that what is evaluated does not depend on the devices.
    max_rows = training.eval_batches and training.eval_batches * batch_size
    evaluator = Evaluator(eval_step, mesh, validation.tokens, tokenizer, length, rows_at_a_time, eot_id, max_rows)
    tokenizer_json = prepared.tokenizer_path.read_text(encoding="utf-8")
    files = {CONFIG_FILE: dump_config(config), TOKENIZER_FILE: tokenizer_json}
    to_go_back_to = training.save_steps if training.on_spike == "rewind" else None
    warn = training.on_save_error == "warn"
    saver = Saver(run_dir, training.save_total_limit, files, mirror, warn, to_go_back_to)
    load = Prefetch(lambda step: put_batch(batches(step, rows), rows, mesh, batch_size), training.max_steps)
    evaluator_or_none = evaluator if validation.num_documents else None
    sources = functools.partial(batches.sources, eot_id=tokenizer.eot_id)
    run = Run(config, run_dir, mesh, info, state, program.train_step, load, sources, evaluator_or_none, saver)
    run.is_best_void = is_best_void
    return run


def run_to_end(
    run: Run, life: Life, overwrite: bool, seen: bytes | None, damaged: list[Path], last_alive: float | None
) -> int:
    """Takes the directory, trains, and leaves it with the last step evaluated and saved. Returns the exit code. `seen`
    is the directory's `stamp` when this start decided what to do, `damaged` are the checkpoints to be set aside, and
    `last_alive` is what `directory.mend` said."""
    num_parameters = count_parameters(run.config.model, run.state.params)
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    facts = {"l1_jax": __version__, "jax": jax.__version__, "devices": devices, "processes": jax.process_count()}
    facts |= {"mesh": dict(run.mesh.shape), "parameters": num_parameters, "data_hash": run.info.data_hash}
    if run.origin:
        facts |= {"origin": dataclasses.asdict(run.origin)}
    tracker, start, mirror = None, "", run.saver.mirror
    with together():
        if is_main():
            alive = None if mirror else life.held.enter_context(run_directory.locked(run.run_dir, seen)) or last_alive
            if overwrite:
                run_directory.clear(run.run_dir)
            void = run.is_best_void
            facts, before = run_directory.take(run.run_dir, run.info, facts, damaged, is_best_void=void)
            start = facts["start"]
            life.clock.begin(run.run_dir / RUN_FILE, facts, before.get("goodput", {}), run.info.step, alive)
            life.held.callback(life.clock.write)
            write_text(run.run_dir / CONFIG_FILE, dump_config(run.config))
            if mirror:
                mirror.take(start)
            tracker = Tracker(run.run_dir, run.config, run.info.step, facts["run_id"])
    with together():
        start = gather(start)[0]
        if mirror:
            mirror.start = start
        else:
            run_directory.check_shared(run.run_dir, start)
    best = run.info.best_step, run.run_dir / BEST
    # The main process knows: without a common disk the others have not seen a rewind.
    if gather(str(best in run_directory.saved(run.run_dir)))[0] == "False" and BEST not in run.missing:
        run.info = dataclasses.replace(run.info, best_loss=None, best_step=None, evaluations_since_best=0)
    shape = ", ".join(f"{axis}={size}" for axis, size in run.mesh.shape.items() if size > 1)
    console.print(
        f"{num_parameters:,} parameters in {run.config.training.precision} on {devices}{shape and f' ({shape})'}; "
        f"steps {run.info.step + 1} to {run.info.total_steps} of {run.info.global_batch_size} sequences of "
        f"{run.config.model.max_seq_length} tokens"
    )
    attention = choose_attention(run.config, run.mesh, run.config.model.dropout)
    log.info("attention: %s%s", attention.name, f" ({attention.why})" if attention.why else "")
    if run.config.training.precision != "float32" and run.mesh.devices.flat[0].platform == "cpu":
        precision = run.config.training.precision
        log.warning("training.precision is %s, which is slower than float32 on a CPU", precision)
    # Whatever ends the run, a save that is under way is finished.
    closing = contextlib.closing
    with life.clock("save"), closing(run.batches), run.saver, tracker or contextlib.nullcontext():
        train_steps(run, tracker, life)
        life.watchdog.expects("the last save")
        life.clock.write()  # before the saver's last upload
        if run.finished and run.saver.wait():
            life.signals.finished()  # what is left is to close files
    info = run.info
    console.print(
        f"step {info.step} of {info.total_steps}, {info.tokens:,} tokens; saved in {display_name(run.run_dir)}"
    )
    if info.best_loss is not None:
        best_model = display_name(run.run_dir / BEST)
        console.print(f"best validation loss {info.best_loss:.4f}, step {info.best_step}: {best_model}")
    if not run.finished:
        console.print("stopped by a signal: the same command with --resume goes on")
    elif info.step < info.total_steps:
        console.print(f"stopped early: {info.evaluations_since_best} validations without a better loss (the patience)")
    console.print(life.clock)
    return EXIT_OK if run.finished else EXIT_STOPPED
