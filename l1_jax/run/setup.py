"""A run before its first step: its config resolved, its functions, its state."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import jax

from l1_jax.checkpoint import resuming
from l1_jax.checkpoint.manifest import CheckpointInfo, Origin, check_undamaged, read_info
from l1_jax.checkpoint.names import CONFIG_FILE, TOKENIZER_FILE
from l1_jax.checkpoint.origin import (
    as_origin,
    find_transfer,
    is_same_transfer,
    origin_of,
    read_origin,
)
from l1_jax.checkpoint.run_directory import ORIGIN, TRANSFER
from l1_jax.checkpoint.saver import Saver
from l1_jax.config.key import values_of
from l1_jax.config.resolve import Facts, Resolved, resolve, stages
from l1_jax.config.stages import stage_at
from l1_jax.config.yaml_file import dump_config
from l1_jax.console import log
from l1_jax.data.batches import Prefetch, TrainingBatches
from l1_jax.data.sources import Source, TokenSource
from l1_jax.data.tokenizer import Tokenizer
from l1_jax.data.tokenizer_kinds import open_tokenizer
from l1_jax.devices.memory import memory_limit
from l1_jax.devices.processes import check_equal, gather, together
from l1_jax.errors import UserError
from l1_jax.evaluation.text import Evaluator
from l1_jax.parallel.layout import Layout, check_divisible
from l1_jax.parallel.placement import process_rows, put_batch
from l1_jax.parallel.sharding import named
from l1_jax.run import drift, guard
from l1_jax.run.loop import Run, is_finished
from l1_jax.run.start import Start
from l1_jax.storage.remote import display_name
from l1_jax.training.average import AVERAGE
from l1_jax.training.initial import (
    Weights,
    choose_weights,
    read_packing,
    restore_state,
    transfer_weights,
)
from l1_jax.training.program import Program, make_program
from l1_jax.training.state import TrainState
from l1_jax.training.step import make_eval_step


class Settled(NamedTuple):
    """What a start has decided before the model is built."""

    config: Resolved
    tokenizer: Tokenizer
    source: Source  # of the training rows
    info: CheckpointInfo  # of the step from which the run goes on
    changed: frozenset[str]  # names of what changed since the checkpoint that is resumed

    @property
    def is_best_void(self) -> bool:
        """Whether the best model's loss was measured on something else."""
        return bool(self.changed & drift.MEASURE)


def set_up(start: Start) -> Run:
    """Resolves the config, builds the functions, makes or restores the state. Writes nothing."""
    settled = settle(start)
    config = settled.config
    training = config.training
    batches = TrainingBatches(settled.source, stages(config), training.seed)

    weights = find_weights(start, config)
    packing = find_packing(start, config, weights)
    program = make_program(config, start.mesh, packing=packing, dims=batches.dims)

    state = begin_state(start, program, settled, weights)
    if settled.changed & drift.TRAINED_ON:
        state = guard.forget_estimate(state)

    run_dir = start.home.path

    is_due = is_finished(settled.info, training) or settled.info.step % training.save_steps == 0
    missing = resuming.find_missing(run_dir, settled.info, start.resumed, is_due=is_due)

    return Run(
        config=config,
        run_dir=run_dir,
        mesh=start.mesh,
        attention=program.attention,
        info=settled.info,
        state=state,
        borrowed=program.borrowed,
        train_step=program.train_step,
        batches=Prefetch(make_loader(start, program, batches), training.max_steps),
        where=batches.where,
        evaluator=make_evaluator(start, program, settled),
        saver=make_saver(start, config),
        origins=find_origins(start, weights),
        is_best_void=settled.is_best_void,
        missing=missing,
    )


def settle(start: Start) -> Settled:
    """Resolves the config with what this start meets, and compares it with what it resumes.

    Raises:
        UserError: the run is not to be computed so, or not to be resumed.
    """
    # Asked by all processes, before one may stop.
    limits = gather(str(memory_limit(start.mesh.local_devices)))
    limit_bytes = min(int(limit) for limit in limits)

    with together():
        tokenizer = open_tokenizer(start.prepared.tokenizer_path)
        source = make_source(start, tokenizer)

        resumed = start.resumed.path
        previous = read_info(resumed) if resumed else None
        facts = Facts(
            vocab_size=tokenizer.vocab_size,
            num_rows=source.num_rows,
            mesh_shape=dict(start.mesh.shape),
            platform=start.mesh.devices.flat[0].platform,
            resumed_batch=previous.global_batch_size if previous else None,
        )

        config = resolve_for(start, facts, limit_bytes)
        info = begin_info(start, config, tokenizer, source)
        changed: set[str] = set()

        if resumed and previous:
            changed = compare(start, resumed, previous, now=info, config=config)
            info = go_on_from(previous, now=info)

    settled = Settled(config, tokenizer, source, info, frozenset(changed))
    if settled.is_best_void:
        settled = settled._replace(info=forget_best(info, changed))

    seen = {"the prepared data": info.data_hash, "the checkpoint to resume": info.step}
    check_equal(values_of(config) | seen)
    return settled


def resolve_for(start: Start, facts: Facts, limit_bytes: int) -> Resolved:
    """The config of a start, resolved with what it has met.

    Args:
        start: of the run.
        facts: what it has met.
        limit_bytes: what may be used of a device.
    """
    config = start.request.config

    if config.training.batch_size == "auto":
        choose = start.request.choose_batch_size
        if choose is None:
            what = "training.batch_size is auto, and nothing was given that chooses it"
            raise UserError(what, "Set it to a number, or give choose_batch_size")

        config = choose(config, facts, start.mesh, limit_bytes)

    resolved = resolve(config, facts)
    check_divisible(resolved.model, start.mesh)

    num_stages = facts.mesh_shape["pipeline"]
    if num_stages > 1:
        count = resolved.parallelism.pipeline_microbatches
        bubble = (num_stages - 1) / (count + num_stages - 1)
        message = "pipeline: %d parts of a microbatch through %d stages, bubble %.0f %%"
        log.info(message, count, num_stages, 100 * bubble)

    return resolved


def make_source(start: Start, tokenizer: Tokenizer) -> Source:
    """The source of the training rows."""
    return TokenSource(
        start.prepared.store("train").tokens,
        tokenizer.eot_id,
        document_mask=start.request.config.data.document_mask,
        digest=start.prepared.data_hash,
    )


def begin_info(
    start: Start, config: Resolved, tokenizer: Tokenizer, source: Source
) -> CheckpointInfo:
    """What is known of a run at step 0."""
    return CheckpointInfo(
        global_batch_size=config.training.global_batch_size,
        total_steps=config.training.max_steps,
        documents=start.prepared.documents_mode,
        data_hash=source.digest,
        tokenizer_sha256=tokenizer.sha256,
    )


def compare(
    start: Start, resumed: Path, previous: CheckpointInfo, *, now: CheckpointInfo, config: Resolved
) -> set[str]:
    """The names of what changed since the checkpoint that is resumed; see `drift`."""
    allowed = set(start.request.allow_change)

    # The same checkpoint by another path is the same.
    path = config.transfer.from_ if config.transfer else None
    if is_same_transfer(start.home.path, path):
        allowed.add("transfer.from")

    return drift.check_changes(resumed, previous, now, config=config, allowed=allowed)


def go_on_from(previous: CheckpointInfo, *, now: CheckpointInfo) -> CheckpointInfo:
    """What is known of a run that goes on from a checkpoint, with the data and length of now."""
    return dataclasses.replace(
        previous,
        total_steps=now.total_steps,
        documents=now.documents,
        data_hash=now.data_hash,
        tokenizer_sha256=now.tokenizer_sha256,
    )


def make_loader(
    start: Start, program: Program, batches: TrainingBatches
) -> Callable[[int], dict[str, jax.Array]]:
    """A function from a step to its batch, on the devices."""
    rows_of_stage = {stage: process_rows(start.mesh, stage.rows) for stage in batches.stages}

    def load(step: int) -> dict[str, jax.Array]:
        stage = stage_at(batches.stages, step)
        rows = rows_of_stage[stage]
        return put_batch(
            batches(step, rows),
            program.dims,
            rows=rows,
            mesh=start.mesh,
            global_batch_size=stage.rows,
        )

    return load


def forget_best(info: CheckpointInfo, changed: Collection[str]) -> CheckpointInfo:
    """`info` without the best loss so far, which was measured on something else."""
    if info.best_loss is not None:
        best = f"the best validation loss so far, {info.best_loss:.4f} of step {info.best_step}"
        names = ", ".join(sorted(set(changed) & drift.MEASURE))
        log.warning("%s, was measured with another value of %s: it counts no more", best, names)

    return dataclasses.replace(info, best_loss=None, best_step=None, evaluations_since_best=0)


def begin_state(
    start: Start, program: Program, settled: Settled, weights: Weights | None
) -> TrainState:
    """The state that the run begins with: of its checkpoint, with given weights, or new."""
    if start.resumed.path:
        return restore_state(start.resumed.path, program.abstract)

    if weights is None:
        return program.create()

    state = transfer_weights(weights, program, settled.config, settled.tokenizer.sha256)
    which = "average of the weights" if weights.item == AVERAGE else "weights"
    log.info("starting with the %s of %s", which, display_name(weights.checkpoint))
    return state


def find_weights(start: Start, config: Resolved) -> Weights | None:
    """The weights with which the run begins; None where they are not another run's."""
    if start.resumed.path:
        return None

    with together():
        path = config.transfer.from_ if config.transfer else None
        source = find_transfer(start.home.path, path, resume=start.request.resume)

        if source is None:
            return None

        item = choose_weights(source)
        check_undamaged(source, (item,))
        return Weights(source, item)


def find_packing(start: Start, config: Resolved, weights: Weights | None) -> dict[str, str]:
    """Which weights are packed in the checkpoint that the run begins with: only what is frozen can
    be."""
    with together():
        if weights:
            return read_packing(weights.checkpoint, weights.item)

        if start.resumed.path and config.transfer and config.transfer.freeze:
            return read_packing(start.resumed.path)

    return {}


def find_origins(start: Start, weights: Weights | None) -> dict[str, Origin]:
    """What run.json is to say of the other runs' checkpoints that this one came from."""
    run_dir = start.home.path
    resumed = start.resumed.path

    origin = origin_of(run_dir, resumed)
    transfer = as_origin(weights.checkpoint) if weights else None

    if resumed and resumed.parent.resolve() == run_dir.resolve():
        transfer = read_origin(run_dir, TRANSFER)

    found = {ORIGIN: origin, TRANSFER: transfer}
    return {name: one for name, one in found.items() if one is not None}


def make_evaluator(start: Start, program: Program, settled: Settled) -> Evaluator | None:
    """What validates the run; None where there is no validation split."""
    validation = start.prepared.store("val")

    if not validation.num_documents:
        message = "the validation split is empty: no validation, no early stopping"
        log.warning("%s and no best_model in this run", message)
        return None

    training = settled.config.training
    eval_step = make_eval_step(program.eval_graphdef, program.objective)

    # Counted in global batches, so that what is evaluated does not depend on the devices.
    max_rows = None
    if training.eval_batches is not None:
        max_rows = training.eval_batches * training.global_batch_size

    return Evaluator(
        eval_step=jax.jit(eval_step, out_shardings=named(start.mesh)),
        mesh=start.mesh,
        stream=validation.tokens,
        tokenizer=settled.tokenizer,
        length=settled.config.model.max_seq_length,
        batch_size=training.batch_size * Layout.of(start.mesh).rows,
        eot_id=settled.tokenizer.eot_id if settled.config.data.document_mask else None,
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
