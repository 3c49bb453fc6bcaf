"""A run from its config to its last checkpoint: the one module that knows all the others."""

import contextlib
import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from l1_jax import __version__, checkpoint
from l1_jax.checkpoint import CheckpointInfo
from l1_jax.cli import EXIT_OK, EXIT_STOPPED, console, log
from l1_jax.config import Config
from l1_jax.config_file import dump_config, load_config
from l1_jax.data.batches import Prefetch, TrainingBatches
from l1_jax.data.token_store import Prepared
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import RunError, UserError, check_writable
from l1_jax.evaluate import Evaluator
from l1_jax.files import write_text
from l1_jax.loop import Run, train_steps
from l1_jax.mirror import Mirror
from l1_jax.model.transformer import count_parameters
from l1_jax.parallel.mesh import create_mesh, keep_freed_memory, select_devices
from l1_jax.parallel.processes import check_equal, gather, is_main, together
from l1_jax.parallel.sharding import Layout, check_divisible, named, process_rows, put_batch
from l1_jax.planner.variants import memory_limit, resolve_auto
from l1_jax.run import directory
from l1_jax.run.signals import StopSignals
from l1_jax.storage import is_url, shown
from l1_jax.training.program import make_program
from l1_jax.training.step import make_eval_step
from l1_jax.training.tracking import Tracker, check_wandb


def train(config: Config, *, resume: bool = False, resume_from: str | None = None, overwrite: bool = False) -> int:
    """Trains as `config` says. The flags are those of scripts/train.py; `resume_from` is the path given with --resume.

    Returns the exit code: 0 done, 75 stopped by a signal after saving. UserError where the config, the data or the
    directory does not allow it, with nothing written; RunError where the loss was not finite or the memory too small.
    """
    output = config.training.output_dir
    with together():
        mirror = Mirror(output, directory.FILES) if is_url(output) else None
        run_dir = mirror.home if mirror else Path(output)
        check_writable(run_dir, "training.output_dir")
        directory.check_files(run_dir, resume)
        if not resume:
            directory.check_free(run_dir, overwrite)
        check_wandb(config.training)
        prepared = Prepared.open(config.data.path)
        mesh = create_mesh(config.parallelism, select_devices(config.training.device))
        found = directory.find_resumed(run_dir, resume_from) if resume else None
    if mesh.devices.flat[0].platform == "cpu":
        keep_freed_memory()
    try:
        with jax.set_mesh(mesh):
            run = set_up(config, prepared, mesh, run_dir, found, mirror)
            if run.finished:
                console.print(f"nothing left to do: the run ended at step {run.info.step} of {run.info.total_steps}")
                return EXIT_OK
            return run_to_end(run, overwrite)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if "Gloo" in str(error) or "NCCL" in str(error):
            remedy = "See what it said, and run the same command again, with --resume"
            raise RunError(f"another process of the job has ended ({str(error).splitlines()[0]})", remedy) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = "Lower training.batch_size or model.max_seq_length, or set training.gradient_checkpointing: true"
        raise RunError(f"the device has too little memory ({str(error).splitlines()[0]})", remedy) from error


def set_up(
    config: Config, prepared: Prepared, mesh: Mesh, run_dir: Path, resumed: Path | None, mirror: Mirror | None
) -> Run:
    """Resolves the config, makes or restores the state, builds the functions. Writes nothing."""
    memory = min(int(limit) for limit in gather(str(memory_limit(mesh))))  # asked by all, before one may stop
    with together():
        tokenizer = Tokenizer.load(prepared.tokenizer_path)
        stream, validation = prepared.store("train").tokens, prepared.store("val")
        previous = checkpoint.read_info(resumed) if resumed else None
        resumed_batch = previous.global_batch_size if previous else None
        config = resolve_auto(config, tokenizer.vocab_size, len(stream), mesh, resumed_batch, memory)
        check_divisible(config.model, mesh)
        training, length = config.training, config.model.max_seq_length
        batch_size = training.global_batch_size
        assert batch_size and isinstance(training.batch_size, int) and training.max_steps  # noqa: PT018, resolved
        facts = (prepared.documents_mode, prepared.data_hash, tokenizer.sha256)
        info = CheckpointInfo(batch_size, training.max_steps, *facts)
        if resumed and previous:
            check_same_run(resumed, previous, info, config)
            info = dataclasses.replace(previous, total_steps=training.max_steps)
    keys = {f"{name}.{key}": value for name, section in vars(config).items() for key, value in vars(section).items()}
    check_equal(keys | {"the prepared data": info.data_hash, "the checkpoint to resume": info.step})

    program = make_program(config, mesh)
    state = checkpoint.restore_state(resumed, program.abstract) if resumed else program.create()

    eot_id = tokenizer.eot_id if config.data.document_mask else None
    batches, rows = TrainingBatches(stream, length, batch_size, training.seed, eot_id), process_rows(mesh, batch_size)
    if not validation.num_documents:
        log.warning("the validation split is empty: no validation, no early stopping and no best_model in this run")
    eval_step = jax.jit(make_eval_step(program.graphdef), out_shardings=named(mesh))
    rows_at_a_time = training.batch_size * Layout.of(mesh).rows
    # Counted in global batches, so that what is evaluated does not depend on the devices.
    max_rows = training.eval_batches and training.eval_batches * batch_size
    evaluator = Evaluator(eval_step, mesh, validation.tokens, tokenizer, length, rows_at_a_time, eot_id, max_rows)
    tokenizer_json = prepared.tokenizer_path.read_text(encoding="utf-8")
    files = {checkpoint.CONFIG_FILE: dump_config(config), checkpoint.TOKENIZER_FILE: tokenizer_json}
    saver = checkpoint.Saver(run_dir, training.save_total_limit, files, mirror)
    load = Prefetch(lambda step: put_batch(batches(step, rows), rows, mesh, batch_size), training.max_steps)
    evaluator_or_none = evaluator if validation.num_documents else None
    return Run(config, run_dir, mesh, info, state, program.train_step, load, evaluator_or_none, saver)


def check_same_run(resumed: Path, previous: CheckpointInfo, current: CheckpointInfo, config: Config) -> None:
    """Raises UserError where going on from `resumed` would not be the same run: other data, model or seed."""
    before = load_config(resumed / checkpoint.CONFIG_FILE)
    pairs = {
        "prepared data": (previous.data_hash, current.data_hash),
        "tokenizer": (previous.tokenizer_sha256, current.tokenizer_sha256),
        "training.seed": (before.training.seed, config.training.seed),
        "training.precision float16": tuple(c.training.precision == "float16" for c in (before, config)),
        "data.document_mask": (before.data.document_mask, config.data.document_mask),
    }
    pairs |= {f"model.{name}": (old, getattr(config.model, name)) for name, old in vars(before.model).items()}
    for name, (old, new) in pairs.items():
        if old != new and name != "model.scan_layers":  # the same numbers, compiled in another way
            what = f"{shown(resumed)} was trained with another value of {name}: {old} there, {new} now"
            raise UserError(what, "Resume with that run's config and data, or start a new run in another directory")


def run_to_end(run: Run, overwrite: bool) -> int:
    """Takes the directory, trains, and leaves it with the last step evaluated and saved. Returns the exit code."""
    num_parameters = count_parameters(run.config.model, run.state.params)
    devices = f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"
    facts = {"l1_jax": __version__, "jax": jax.__version__, "devices": devices, "processes": jax.process_count()}
    facts |= {"mesh": dict(run.mesh.shape), "parameters": num_parameters, "data_hash": run.info.data_hash}
    tracker, run_id = None, ""
    with together():
        if is_main():
            if overwrite:
                directory.clear(run.run_dir)
            run_id = directory.take(run.run_dir, run.info.step, facts)
            write_text(run.run_dir / checkpoint.CONFIG_FILE, dump_config(run.config))
            if run.saver.mirror:
                run.saver.mirror.take()
            tracker = Tracker(run.run_dir, run.config, run.info.step, run_id)
    with together():
        run_id = gather(run_id)[0]
        if not run.saver.mirror:
            directory.check_shared(run.run_dir, run_id)
    best = run.info.best_step, run.run_dir / checkpoint.BEST
    # The main process knows: without a common disk the others have not seen a rewind.
    if gather(str(best in directory.saved(run.run_dir)))[0] == "False":
        run.info = dataclasses.replace(run.info, best_loss=None, best_step=None, evaluations_since_best=0)
    console.print(
        f"{num_parameters:,} parameters in {run.config.training.precision} on {devices}; steps {run.info.step + 1} to "
        f"{run.info.total_steps} of {run.info.global_batch_size} sequences of {run.config.model.max_seq_length} tokens"
    )
    # Whatever ends the run, a save that is under way is finished.
    closing = contextlib.closing
    with StopSignals() as signals, closing(run.batches), closing(run.saver), tracker or contextlib.nullcontext():
        train_steps(run, tracker, signals)
    info = run.info
    console.print(f"step {info.step} of {info.total_steps}, {info.tokens:,} tokens; saved in {shown(run.run_dir)}")
    if info.best_loss is not None:
        best_model = shown(run.run_dir / checkpoint.BEST)
        console.print(f"best validation loss {info.best_loss:.4f}, step {info.best_step}: {best_model}")
    if not run.finished:
        console.print("stopped by a signal: the same command with --resume goes on")
    elif info.step < info.total_steps:
        console.print(f"stopped early: {info.evaluations_since_best} validations without a better loss (the patience)")
    return EXIT_OK if run.finished else EXIT_STOPPED
