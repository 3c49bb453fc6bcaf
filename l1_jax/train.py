"""A run from its config to its last checkpoint: the one module that knows all the others."""

import collections
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l1_jax import __version__, checkpoint
from l1_jax.cli import EXIT_OK, EXIT_STOPPED, console, log
from l1_jax.config import Config
from l1_jax.config_file import config_from_text, dump_config
from l1_jax.data.batches import Prefetch, TrainingBatches
from l1_jax.data.token_store import Prepared
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.errors import NotFiniteError, UserError
from l1_jax.evaluate import Evaluator
from l1_jax.model.transformer import build, count_parameters
from l1_jax.parallel.mesh import create_mesh, peak_flops, select_devices
from l1_jax.parallel.sharding import batch_shards, check_divisible, named, parameter_shardings, process_rows, put_batch
from l1_jax.run import directory
from l1_jax.run.resolve import resolve
from l1_jax.run.signals import StopSignals
from l1_jax.training.optimizer import create_optimizer, learning_rate_schedule
from l1_jax.training.state import TrainState, state_initialiser, state_shardings
from l1_jax.training.step import make_eval_step, make_train_step
from l1_jax.training.tracking import SpeedMeter, Tracker, check_wandb


@dataclasses.dataclass
class Run:
    """A run with its state on the devices and its functions compiled."""

    config: Config  # resolved
    run_dir: Path
    mesh: Mesh
    info: checkpoint.CheckpointInfo  # of the last step
    state: TrainState
    train_step: Any
    batches: Prefetch
    evaluator: Evaluator | None
    saver: checkpoint.Saver
    num_parameters: int


def train(config: Config, *, resume: bool = False, resume_from: str | None = None, overwrite: bool = False) -> int:
    """Trains as `config` says.

    Args:
        config: as loaded; what depends on data and devices is resolved here.
        resume: go on with the run in `training.output_dir`.
        resume_from: go on from this checkpoint instead of the newest.
        overwrite: replace the run that is in `training.output_dir`.

    Returns:
        The exit code: 0 done, 75 stopped by a signal after saving.

    Raises:
        UserError: the config, the data or the directory does not allow it; nothing has been written then.
        NotFiniteError: the loss was not finite.
    """
    run_dir = Path(config.training.output_dir)
    if not resume and not overwrite:
        directory.check_free(run_dir)
    check_wandb(config.training.wandb_project)
    prepared = Prepared.open(config.data.path)
    mesh = create_mesh(config.parallelism, select_devices(config.training.device))
    found = directory.find_resumed(run_dir, resume_from) if resume else None
    with jax.set_mesh(mesh):
        run = set_up(config, prepared, mesh, run_dir, found)
        if finished(run):
            console.print(f"nothing left to do: {run_dir} ended at step {run.info.step} of {run.info.total_steps}")
            return EXIT_OK
        return run_loop(run, overwrite)


def set_up(config: Config, prepared: Prepared, mesh: Mesh, run_dir: Path, resumed: Path | None) -> Run:
    """Resolves the config, makes or restores the state, compiles the steps. Writes nothing."""
    tokenizer = Tokenizer.load(prepared.tokenizer_path)
    stream = prepared.store("train").tokens
    previous = checkpoint.read_info(resumed) if resumed else None
    config = resolve(
        config,
        vocab_size=tokenizer.vocab_size,
        num_rows=(len(stream) - 1) // config.model.max_seq_length,
        shards=batch_shards(mesh),
        platform=mesh.devices.flat[0].platform,
        resumed_batch=previous.global_batch_size if previous else None,
    )
    check_divisible(config.model, mesh)
    training, length = config.training, config.model.max_seq_length
    info = checkpoint.CheckpointInfo(
        step=0,
        tokens=0,
        global_batch_size=training.global_batch_size,
        total_steps=training.max_steps,
        documents=prepared.documents_mode,
        data_hash=prepared.data_hash,
        tokenizer_sha256=tokenizer.sha256,
        l1_jax_version=__version__,
    )
    if resumed and previous:
        check_same_run(resumed, previous, info, config)
        info = dataclasses.replace(previous, total_steps=training.max_steps, l1_jax_version=__version__)

    dtype = jnp.dtype(training.precision)
    remat = {True: "full", False: "none"}.get(training.gradient_checkpointing, training.gradient_checkpointing)
    graphdef, initialise, axes = build(config.model, dtype, remat)
    optimizer = create_optimizer(training)
    create = state_initialiser(initialise, optimizer, training.seed, training.precision == "float16")
    shardings = state_shardings(create, optimizer, axes, mesh)
    if resumed:
        abstract = jax.tree.map(
            lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
            jax.eval_shape(create),
            shardings,
        )
        state = checkpoint.restore_state(resumed, abstract)
    else:
        state = jax.jit(create, out_shardings=shardings)()

    eot_id = tokenizer.eot_id if config.data.document_mask else None
    batches = TrainingBatches(stream, length, info.global_batch_size, training.seed, eot_id)
    rows = process_rows(mesh, info.global_batch_size)
    load = Prefetch(lambda step: put_batch(batches(step, rows), mesh, info.global_batch_size), training.max_steps)
    train_step = make_train_step(
        graphdef,
        optimizer,
        learning_rate_schedule(training, training.schedule_steps),
        seed=training.seed,
        dropout=config.model.dropout,
        accumulation=training.gradient_accumulation_steps,
        shards=batch_shards(mesh),
    )
    compiled = jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, named(mesh)))
    return Run(
        config=config,
        run_dir=run_dir,
        mesh=mesh,
        info=info,
        state=state,
        train_step=compiled,
        batches=load,
        evaluator=create_evaluator(
            config, prepared, tokenizer, mesh, make_eval_step(graphdef, batch_shards(mesh)), axes
        ),
        saver=checkpoint.Saver(
            run_dir,
            training.save_total_limit,
            {
                checkpoint.CONFIG_FILE: dump_config(config),
                checkpoint.TOKENIZER_FILE: prepared.tokenizer_path.read_text(encoding="utf-8"),
            },
        ),
        num_parameters=count_parameters(config.model, state.params),
    )


def create_evaluator(
    config: Config, prepared: Prepared, tokenizer: Tokenizer, mesh: Mesh, eval_step: Any, axes: dict[str, Any]
) -> Evaluator | None:
    """Of the validation split; None, said aloud, where that is empty."""
    store = prepared.store("val")
    if store.num_documents == 0:
        log.warning("the validation split is empty: no validation, no early stopping and no best_model in this run")
        return None
    return Evaluator(
        jax.jit(
            eval_step, in_shardings=(parameter_shardings(mesh, axes), named(mesh, "batch")), out_shardings=named(mesh)
        ),
        mesh,
        store.tokens,
        tokenizer,
        length=config.model.max_seq_length,
        batch_size=config.training.batch_size * batch_shards(mesh),
        eot_id=tokenizer.eot_id if config.data.document_mask else None,
        max_batches=config.training.eval_batches,
    )


def check_same_run(
    resumed: Path, previous: checkpoint.CheckpointInfo, current: checkpoint.CheckpointInfo, config: Config
) -> None:
    """Raises UserError where going on from `resumed` would not be the same run: other data, model or seed."""
    before = config_from_text((resumed / checkpoint.CONFIG_FILE).read_text(), str(resumed / checkpoint.CONFIG_FILE))
    pairs = {
        "the prepared data": (previous.data_hash, current.data_hash),
        "the tokenizer": (previous.tokenizer_sha256, current.tokenizer_sha256),
        "training.seed": (before.training.seed, config.training.seed),
        "data.document_mask": (before.data.document_mask, config.data.document_mask),
    }
    pairs |= {
        f"model.{name}": (value, getattr(config.model, name))
        for name, value in vars(before.model).items()
        if name != "scan_layers"  # the same numbers, compiled in another way
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise UserError(
                f"{resumed} was trained with another {name}: {old} there, {new} now",
                "Resume with the config and the data of that run, or start a new run in another training.output_dir",
            )


def run_loop(run: Run, overwrite: bool) -> int:
    """Takes the directory, trains to the end, and leaves it with the last step evaluated and saved.

    Returns:
        The exit code.
    """
    if overwrite:
        directory.clear(run.run_dir)
    run.run_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.recover(run.run_dir)
    directory.rewind(run.run_dir, run.info.step)
    directory.write_text(run.run_dir / checkpoint.CONFIG_FILE, dump_config(run.config))
    run_id = directory.describe(run.run_dir, describe(run))
    with StopSignals() as signals, Tracker(run.run_dir, run.config, run.info.step, run_id) as tracker:
        _train_steps(run, tracker, signals)
        run.saver.close()
    run.batches.close()
    if signals.received:
        console.print(f"stopped by a signal at step {run.info.step}, saved; the same command with --resume goes on")
        return EXIT_STOPPED
    _print_summary(run)
    return EXIT_OK


def _train_steps(run: Run, tracker: Tracker, signals: StopSignals) -> None:
    training, total = run.config.training, run.info.total_steps
    started = time.perf_counter()
    train_step = run.train_step.lower(run.state, run.batches(run.info.step)).compile()
    log.info("compiled in %.1f s", time.perf_counter() - started)
    meter = SpeedMeter(run.num_parameters, run.config.model, peak_flops(run.mesh))
    # Metrics are fetched one step late, so that an accelerator never waits for the host. CPU devices get one step at
    # a time: with several in flight their collectives starve one another.
    behind = 0 if run.mesh.devices.flat[0].platform == "cpu" else 1
    in_flight: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    with jax.transfer_guard("disallow"):
        for step in range(run.info.step + 1, total + 1):
            run.state, metrics = train_step(run.state, run.batches(step - 1))
            in_flight.append((step, metrics))
            evaluates, saves = step % training.eval_steps == 0, step % training.save_steps == 0
            boundary = evaluates or saves or step == total or signals.received
            while len(in_flight) > (0 if boundary else behind):
                _consume(run, tracker, meter, *in_flight.popleft())
            if boundary:
                with meter.paused(), jax.transfer_guard("allow"):
                    _evaluate_and_save(run, tracker, evaluates or step == total, saves or bool(signals.received))
                if signals.received or finished(run):
                    return


def _consume(run: Run, tracker: Tracker, meter: SpeedMeter, step: int, metrics: dict[str, jax.Array]) -> None:
    """Fetches and logs the metrics of a step, and accepts it as done."""
    values = jax.device_get(metrics)
    tokens = int(values["tokens"])
    run.info = dataclasses.replace(run.info, step=step, tokens=run.info.tokens + tokens)
    meter.add(tokens)
    tracker.advance(step, float(values["loss"]))
    if not values["finite"]:
        if run.state.loss_scale is None:
            raise NotFiniteError(
                f"the loss or gradient of step {step} is not finite; its update was not applied",
                "Lower training.learning_rate, or resume from the last checkpoint with another config",
            )
        log.warning("step %d: the float16 gradient overflowed; no update, the loss scale is halved", step)
    if step == 1 or step % run.config.training.logging_steps == 0 or step == run.info.total_steps:
        row = {f"train/{name}": float(values[name]) for name in ("loss", "learning_rate", "grad_norm")}
        batch_hash = {"data/batch_hash": f"{int(values['batch_hash']):08x}"}
        tracker.log(step, row | {"train/tokens": run.info.tokens} | meter.read() | batch_hash)


def _evaluate_and_save(run: Run, tracker: Tracker, evaluates: bool, saves: bool) -> None:
    info, best = run.info, False
    if evaluates and run.evaluator:
        result = run.evaluator(run.state.params)
        tracker.log(
            info.step, {f"val/{name}": getattr(result, name) for name in ("loss", "perplexity", "bits_per_byte")}
        )
        # A loss that is not a number is below nothing, so it is never the best.
        best = result.loss < (math.inf if info.best_loss is None else info.best_loss)
        info = dataclasses.replace(info, last_loss=result.loss, evaluations_since_best=info.evaluations_since_best + 1)
        if best:
            info = dataclasses.replace(info, best_loss=result.loss, best_step=info.step, evaluations_since_best=0)
    run.info = info
    regular = saves or finished(run)
    if regular or best:
        run.saver.save(run.state, info, best=best, regular=regular)


def finished(run: Run) -> bool:
    """Whether the run has reached its last step, or its patience has ended."""
    patience = run.config.training.early_stopping_patience
    stopped_early = patience is not None and run.info.evaluations_since_best >= patience
    return run.info.step >= run.info.total_steps or stopped_early


def describe(run: Run) -> dict[str, Any]:
    """The facts of a run that are in no config."""
    device = run.mesh.devices.flat[0]
    return {
        "l1_jax": __version__,
        "jax": jax.__version__,
        "devices": f"{run.mesh.size} x {device.device_kind}",
        "mesh": dict(run.mesh.shape),
        "parameters": run.num_parameters,
        "total_steps": run.info.total_steps,
        "data_hash": run.info.data_hash,
        "tokenizer_sha256": run.info.tokenizer_sha256,
    }


def _print_summary(run: Run) -> None:
    info = run.info
    early = f", stopped early: {info.evaluations_since_best} validations without improvement"
    console.print(f"done at step {info.step}, {info.tokens:,} tokens{early if info.step < info.total_steps else ''}")
    if info.best_loss is not None:
        where = run.run_dir / checkpoint.BEST
        console.print(f"best validation loss {info.best_loss:.4f} at step {info.best_step}: {where}", markup=False)
