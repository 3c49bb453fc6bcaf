"""A run before its first step: what it meets, what it goes on from, its functions and its state."""

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from l1_jax.checkpoint import resuming
from l1_jax.checkpoint.manifest import CheckpointInfo, Origin, check_undamaged, read_info
from l1_jax.checkpoint.names import CONFIG_FILE, TOKENIZER_FILE
from l1_jax.checkpoint.origin import as_origin, find_transfer, origin_of, read_origin
from l1_jax.checkpoint.resuming import Resumed, find_resumed
from l1_jax.checkpoint.run_directory import ORIGIN, TRANSFER, RunDirectory
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.key import values_of
from l1_jax.config.resolve import Facts, Resolved, resolve
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import dump_config
from l1_jax.console import log
from l1_jax.data.batches import Prefetch, TrainingBatches
from l1_jax.data.store import FOR_TRAINING, Prepared
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.devices.compiled import keep_compiled
from l1_jax.devices.memory import memory_limit
from l1_jax.devices.processes import check_equal, gather, together
from l1_jax.devices.select import keep_freed_memory, make_deterministic, select_devices
from l1_jax.errors import UserError
from l1_jax.evaluation.text import Evaluator
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.mesh import create_mesh
from l1_jax.parallel.placement import process_rows, put_batch
from l1_jax.parallel.sharding import named
from l1_jax.run import drift, guard
from l1_jax.run.loop import Run
from l1_jax.run.tracking import check_wandb
from l1_jax.storage.remote import display_name, is_url
from l1_jax.training.initial import restore_state, transfer_weights
from l1_jax.training.program import Program, make_program
from l1_jax.training.state import PARAMS, TrainState
from l1_jax.training.step import make_eval_step

# What decides `training.batch_size: auto`: from a config, what it meets, the mesh and the bytes
# that may be used of a device, to a config with a number.
BatchSizeChooser = Callable[[Config, Facts, Mesh, int], Config]


@dataclasses.dataclass
class Start:
    """A start of a run, as far as it is known before anything is written."""

    config: Config
    resume: bool
    resume_from: str | None
    overwrite: bool
    allow_change: Collection[str]
    choose_batch_size: BatchSizeChooser | None

    prepared: Prepared
    mesh: Mesh

    home: RunDirectory
    resumed: Resumed = dataclasses.field(default_factory=Resumed)


def look_around(
    config: Config, *, resume: bool, resume_from: str | None, overwrite: bool, **options: Any
) -> Start:
    """Everything that can be refused before the data are read, and what is resumed. Writes nothing
    but the names that a kill took from checkpoints."""
    training = config.training

    with together():
        if training.deterministic:
            make_deterministic()

        home = RunDirectory(training.output_dir)
        home.check_files(resume=resume)

        if not resume:
            home.check_free(overwrite=overwrite)

        check_wandb(training)
        prepared = Prepared.open(config.data.path)

        if training.device in ("auto", "cpu"):
            keep_freed_memory()

        devices = select_devices(training.device)
        mesh = create_mesh(config.parallelism, devices)
        keep_compiled(devices)

        # On a common disk each process hashes a share; from object storage each has a copy of its
        # own.
        share = (0, 1)
        if not is_url(config.data.path):
            share = (jax.process_index(), jax.process_count())
        prepared.check(FOR_TRAINING, share)

        if home.mirror and jax.process_count() > 1 and training.on_spike == "rewind":
            what = "training.on_spike is rewind, which several processes cannot do"
            remedy = "Set it to skip, or training.output_dir to a directory that all share"
            raise UserError(f"{what} with a run in object storage", remedy)

        home.look()
        start = Start(
            config,
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            prepared=prepared,
            mesh=mesh,
            home=home,
            **options,
        )

    if resume:
        home.recover()
        start.resumed = find_resumed(home, resume_from)

    return start


def set_up(start: Start) -> Run:
    """Resolves the config, makes or restores the state, builds the functions. Writes nothing."""
    # Asked by all processes, before one may stop.
    limits = gather(str(memory_limit(start.mesh.local_devices)))
    limit_bytes = min(int(limit) for limit in limits)

    with together():
        tokenizer = Tokenizer.load(start.prepared.tokenizer_path)
        stream = start.prepared.store("train").tokens
        resumed = start.resumed.path
        previous = read_info(resumed) if resumed else None
        config = resolve_for(start, tokenizer, len(stream), previous, limit_bytes)
        info, changed = begin_info(start, config, tokenizer, previous)

    is_best_void = bool(changed & drift.MEASURE)
    if is_best_void:
        info = forget_best(info, changed)

    facts = {"the prepared data": info.data_hash, "the checkpoint to resume": info.step}
    check_equal(values_of(config) | facts)

    program = make_program(config, start.mesh)
    source = find_weights(start, config)
    state = begin_state(start, program, config, tokenizer, source)
    if changed & drift.TRAINED_ON:
        state = guard.forget_estimate(state)

    training = config.training
    eot_id = tokenizer.eot_id if config.data.document_mask else None
    batch_size = training.global_batch_size
    batches = TrainingBatches(
        stream, config.model.max_seq_length, batch_size, training.seed, eot_id
    )
    rows = process_rows(start.mesh, batch_size)

    def load(step: int) -> dict[str, jax.Array]:
        return put_batch(batches(step, rows), rows, start.mesh, batch_size)

    run = Run(
        config=config,
        run_dir=start.home.path,
        mesh=start.mesh,
        info=info,
        state=state,
        train_step=program.train_step,
        batches=Prefetch(load, training.max_steps),
        sources=functools.partial(batches.sources, eot_id=tokenizer.eot_id),
        evaluator=make_evaluator(start, program, config, tokenizer, eot_id),
        saver=make_saver(start, config),
        is_best_void=is_best_void,
    )
    run.origins = find_origins(start, source)

    is_due = run.finished or run.info.step % training.save_steps == 0
    run.missing = resuming.find_missing(run.run_dir, run.info, start.resumed, is_due=is_due)
    return run


def resolve_for(
    start: Start,
    tokenizer: Tokenizer,
    num_tokens: int,
    previous: CheckpointInfo | None,
    limit_bytes: int,
) -> Resolved:
    """The config of a start, resolved with what it has met."""
    config = start.config
    facts = Facts(
        vocab_size=tokenizer.vocab_size,
        num_tokens=num_tokens,
        mesh_shape=dict(start.mesh.shape),
        platform=start.mesh.devices.flat[0].platform,
        resumed_batch=previous.global_batch_size if previous else None,
    )

    if config.training.batch_size == "auto":
        if start.choose_batch_size is None:
            what = "training.batch_size is auto, and nothing was given that chooses it"
            raise UserError(what, "Set it to a number, or give choose_batch_size")

        config = start.choose_batch_size(config, facts, start.mesh, limit_bytes)

    resolved = resolve(config, facts)
    check_divisible(resolved.model, start.mesh)

    stages = facts.mesh_shape["pipeline"]
    if stages > 1:
        count = resolved.parallelism.pipeline_microbatches
        bubble = (stages - 1) / (count + stages - 1)
        message = "pipeline: %d parts of a microbatch through %d stages, bubble %.0f %%"
        log.info(message, count, stages, 100 * bubble)

    return resolved


def begin_info(
    start: Start, config: Resolved, tokenizer: Tokenizer, previous: CheckpointInfo | None
) -> tuple[CheckpointInfo, set[str]]:
    """What is known of the run before its first step, and the names of what changed since the
    checkpoint that it resumes."""
    info = CheckpointInfo(
        global_batch_size=config.training.global_batch_size,
        total_steps=config.training.max_steps,
        documents=start.prepared.documents_mode,
        data_hash=start.prepared.data_hash,
        tokenizer_sha256=tokenizer.sha256,
    )

    if start.resumed.path is None or previous is None:
        return info, set()

    changed = drift.check(start.resumed.path, previous, info, config, start.allow_change)
    resumed = dataclasses.replace(
        previous,
        total_steps=info.total_steps,
        documents=info.documents,
        data_hash=info.data_hash,
        tokenizer_sha256=info.tokenizer_sha256,
    )
    return resumed, changed


def forget_best(info: CheckpointInfo, changed: Collection[str]) -> CheckpointInfo:
    """`info` without the best loss so far, which was measured on something else."""
    if info.best_loss is not None:
        best = f"the best validation loss so far, {info.best_loss:.4f} of step {info.best_step}"
        names = ", ".join(sorted(set(changed) & drift.MEASURE))
        log.warning("%s, was measured with another value of %s: it counts no more", best, names)

    return dataclasses.replace(info, best_loss=None, best_step=None, evaluations_since_best=0)


def begin_state(
    start: Start, program: Program, config: Resolved, tokenizer: Tokenizer, source: Path | None
) -> TrainState:
    """The state that the run begins with: of its checkpoint, with the weights of `source`, or
    new."""
    if start.resumed.path:
        return restore_state(start.resumed.path, program.abstract)

    if source is None:
        return program.create()

    log.info("starting with the weights of %s", display_name(source))
    return transfer_weights(source, program, config, tokenizer.sha256)


def find_weights(start: Start, config: Resolved) -> Path | None:
    """The checkpoint with whose weights the run begins; None where that is not another run's."""
    if start.resumed.path or config.transfer is None or config.transfer.from_ is None:
        return None

    with together():
        source = find_transfer(start.home.path, config.transfer.from_, resume=start.resume)
        check_undamaged(source, (PARAMS,))

    return source


def find_origins(start: Start, source: Path | None) -> dict[str, Origin]:
    """What run.json is to say of the other runs' checkpoints that this one came from."""
    run_dir = start.home.path
    resumed = start.resumed.path

    origin = origin_of(run_dir, resumed)
    transfer = as_origin(source) if source else None

    if resumed and resumed.parent.resolve() == run_dir.resolve():
        transfer = read_origin(run_dir, TRANSFER)

    found = {ORIGIN: origin, TRANSFER: transfer}
    return {name: one for name, one in found.items() if one is not None}


def make_evaluator(
    start: Start, program: Program, config: Resolved, tokenizer: Tokenizer, eot_id: int | None
) -> Evaluator | None:
    """What validates the run; None where there is no validation split."""
    validation = start.prepared.store("val")

    if not validation.num_documents:
        message = "the validation split is empty: no validation, no early stopping"
        log.warning("%s and no best_model in this run", message)
        return None

    training = config.training
    eval_step = make_eval_step(program.eval_graphdef)

    # Counted in global batches, so that what is evaluated does not depend on the devices.
    max_rows = training.eval_batches and training.eval_batches * training.global_batch_size

    return Evaluator(
        eval_step=jax.jit(eval_step, out_shardings=named(start.mesh)),
        mesh=start.mesh,
        stream=validation.tokens,
        tokenizer=tokenizer,
        length=config.model.max_seq_length,
        batch_size=training.batch_size * Layout.of(start.mesh).rows,
        eot_id=eot_id,
        max_rows=max_rows,
    )


def make_saver(start: Start, config: Resolved) -> Saver:
    """What writes the run's checkpoints."""
    training = config.training
    texts = {
        CONFIG_FILE: dump_config(config),
        TOKENIZER_FILE: start.prepared.tokenizer_path.read_text(encoding="utf-8"),
    }
    return Saver(
        start.home.path,
        keep=training.save_total_limit,
        texts=texts,
        mirror=start.home.mirror,
        warn=training.on_save_error == "warn",
        keep_every=training.save_steps if training.on_spike == "rewind" else None,
    )
