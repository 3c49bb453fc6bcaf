"""What may differ between a run and its resumption: one table, of every key of the config."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from l1_jax.checkpoint.names import CONFIG_FILE
from l1_jax.checkpoint.restore import CheckpointInfo, read_info
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.errors import UserError, nearest
from l1_jax.storage.remote import display_name
from l1_jax.training.schedule import learning_rate_schedule

# The resumed run would not be the same one. Beside keys: what the checkpoint knows of its data, and float16, with which
# the state has a loss scale.
FACTS = ("data", "tokenizer", "float16")
FATAL = """
model.vocab_size model.max_seq_length model.n_layers model.n_heads model.n_embd model.n_kv_heads model.n_inner
model.position_embedding model.rope_theta model.norm model.layer_norm_epsilon model.qk_norm model.activation model.bias
model.tie_embeddings model.logit_softcap data.document_mask training.seed training.optimizer training.moment_dtype
"""
# The same run, with other numbers from here on.
WARNED = """
model.dropout training.max_steps training.schedule_steps training.learning_rate training.min_learning_rate
training.warmup_steps training.schedule training.decay_fraction training.muon_learning_rate training.weight_decay
training.beta1 training.beta2 training.eps training.max_grad_norm training.precision training.eval_steps
training.eval_batches training.early_stopping_patience training.on_nonfinite training.on_spike training.spike_threshold
training.max_skipped_steps
"""
# The same numbers, up to rounding, or nothing to do with them. fp16, num_epochs and the keys of the batch act through
# others: precision, max_steps, and a global batch that is kept.
FREE = """
model.initializer_range model.zero_init_projections model.scan_layers data.path training.num_epochs training.batch_size
training.global_batch_size training.gradient_accumulation_steps training.device training.attention training.fp16
training.deterministic
training.gradient_checkpointing training.save_steps training.save_total_limit training.logging_steps training.output_dir
training.on_save_error training.grace_seconds training.hang_timeout_seconds training.wandb_project
training.wandb_run_name parallelism.data parallelism.fsdp parallelism.tensor parallelism.context parallelism.pipeline
parallelism.pipeline_microbatches generation.temperature generation.top_k generation.top_p generation.min_p
generation.repetition_penalty
"""
CLASSES = {
    name: kind for kind, names in (("fatal", FATAL), ("warned", WARNED), ("free", FREE)) for name in names.split()
}


CLASSES |= dict.fromkeys(FACTS, "fatal")


# What a validation loss is of: after a change of these the best one so far is no match for a new one.
MEASURE = frozenset(("data", "tokenizer", "data.document_mask", "model.max_seq_length", "training.eval_batches"))
# What the training loss is of: after a change of these what the steps so far say of the next loss is void.
TRAINED_ON = frozenset(
    name
    for name, kind in CLASSES.items()
    if kind != "free" and name.partition(".")[0] in ("data", "tokenizer", "model")
)


def check_names(allowed: Collection[str]) -> None:
    """Raises UserError where one of the names given with --allow-change is none that would be refused."""
    names = [name for name, kind in CLASSES.items() if kind == "fatal"]
    for name in allowed:
        if name not in names:
            what = f"--allow-change {name}: that is no change that would be refused{nearest(name, names)}"
            raise UserError(what, f"The names are {', '.join(names)}")


def facts(config: Config, info: CheckpointInfo) -> dict[str, Any]:
    """All that a resumption is compared by, by the names of `CLASSES`; `config` is resolved."""
    sections = {name: vars(section) for name, section in vars(config).items()}
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    own = (info.data_hash, info.tokenizer_sha256, values["training.precision"] == "float16")
    return values | dict(zip(FACTS, own, strict=True))


def changes(checkpoint: Path, info: CheckpointInfo, config: Config) -> set[str]:
    """The names of what differs between a checkpoint and a run at `info`."""
    old = facts(load_config(checkpoint / CONFIG_FILE, of_a_run=True), read_info(checkpoint))
    new = facts(config, info)
    return {name for name in CLASSES if old[name] != new[name]}


def check(
    resumed: Path, previous: CheckpointInfo, now: CheckpointInfo, config: Config, allowed: Collection[str]
) -> set[str]:
    """Compares a run with the checkpoint that it goes on from, and says what changed; returns the names. UserError
    where a fatal change is not in `allowed`. What then does not fit the arrays is refused when they are restored."""
    before = load_config(resumed / CONFIG_FILE, of_a_run=True)
    old, new = facts(before, previous), facts(config, now)
    changed = {name: f"{name}: {old[name]} there, {new[name]} now" for name in CLASSES if old[name] != new[name]}
    refused = [name for name in changed if CLASSES[name] == "fatal" and name not in allowed]
    if refused:
        others = (
            f"another value of {changed[refused[0]]}" if len(refused) == 1 else f"other values of {', '.join(refused)}"
        )
        allow = " ".join(f"--allow-change {name}" for name in refused)
        remedy = f"Resume with that run's config and data, start a new run in another directory, or give {allow}"
        details = [changed[name] for name in refused] if len(refused) > 1 else ()
        raise UserError(f"{display_name(resumed)} was trained with {others}", remedy, details)
    step, same_schedule = previous.step, "training.schedule_steps" not in changed
    for name in changed:
        kind = "free" if name == "training.max_steps" and same_schedule else CLASSES[name]
        if name == "training.save_steps" and config.training.on_spike == "rewind":
            kind = "warned"  # it goes back to other steps
        kind = "allowed" if kind == "fatal" else kind
        level = logging.INFO if kind == "free" else logging.WARNING
        log.log(level, "changed since step %d: %s %s -> %s (%s)", step, name, old[name], new[name], kind)
    was, now_is = (float(learning_rate_schedule(c.training)(step + 1)) for c in (before, config))
    if was != now_is:
        log.warning("the learning rate of step %d would have been %.4g, and is now %.4g", step + 1, was, now_is)
    return set(changed)
