"""What may differ between a run and its resumption: every key of the config says it of itself."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from l1_jax.checkpoint.manifest import CheckpointInfo, read_info
from l1_jax.checkpoint.names import CONFIG_FILE
from l1_jax.config.key import keys_of, to_text, values_of
from l1_jax.config.resolve import Resolved
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import load_config
from l1_jax.console import log
from l1_jax.errors import UserError, nearest
from l1_jax.storage.remote import display_name
from l1_jax.training.schedule import learning_rate_schedule

# Beside the keys: what the checkpoint knows of its data, and float16, with which the state has a
# loss scale.
FACTS = ("data", "tokenizer", "float16")

MEANINGS = {name: field.metadata["resume"] for name, field in keys_of(Config)}
MEANINGS |= dict.fromkeys(FACTS, "fatal")

# What a validation loss is of: after a change of these the best one so far is no match for a new
# one.
MEASURE = frozenset(("data", "tokenizer")).union(
    name for name, field in keys_of(Config) if field.metadata["is_of_measure"]
)

# What the training loss is of: after a change of these what the steps so far say of the next loss
# is void.
TRAINED_ON = frozenset(
    name
    for name, meaning in MEANINGS.items()
    if meaning != "free" and name.partition(".")[0] in ("data", "tokenizer", "model")
)


def check_names(allowed: Collection[str]) -> None:
    """Raises UserError where one of the changes that a user allows is none that would be
    refused."""
    names = [name for name, meaning in MEANINGS.items() if meaning == "fatal"]

    for name in allowed:
        if MEANINGS.get(name) == "never":
            what = f"a change of {name} cannot be allowed"
            raise UserError(what, "Begin a run with transfer.from instead of the resume")

        if name not in names:
            what = f"{name} is no change that would be refused{nearest(name, names)}"
            raise UserError(what, f"The names are {', '.join(names)}")


def facts(config: Config, info: CheckpointInfo) -> dict[str, Any]:
    """All that a resumption is compared by, by the names of `MEANINGS`; `config` was resolved."""
    values = values_of(config)

    # A run of an older version wrote null where this one writes what follows.
    values["model.n_inner"] = config.model.hidden_size
    values["model.n_kv_heads"] = config.model.kv_heads
    values["model.head_size"] = config.model.head_dims
    values["model.attention_dropout"] = config.model.attention_rate

    # A section that is absent freezes nothing, as an empty one.
    values["transfer.freeze"] = values["transfer.freeze"] or ()

    values["data"] = info.data_hash
    values["tokenizer"] = info.tokenizer_sha256
    values["float16"] = config.training.precision == "float16"
    return values


def changes(checkpoint: Path, info: CheckpointInfo, config: Config) -> set[str]:
    """The names of what differs between a checkpoint and a run at `info`."""
    before = load_config(checkpoint / CONFIG_FILE, of_a_run=True)
    old = facts(before, read_info(checkpoint))
    new = facts(config, info)
    return {name for name in MEANINGS if old[name] != new[name]}


def check_changes(
    resumed: Path,
    previous: CheckpointInfo,
    now: CheckpointInfo,
    config: Resolved,
    allowed: Collection[str],
) -> set[str]:
    """Compares a run with the checkpoint that it goes on from, and says what changed.

    What then does not fit the arrays is refused when they are restored.

    Returns:
        The names of what changed.

    Raises:
        UserError: a fatal change is not in `allowed`.
    """
    before = load_config(resumed / CONFIG_FILE, of_a_run=True)
    old = facts(before, previous)
    new = facts(config, now)
    changed = [name for name in MEANINGS if old[name] != new[name]]

    is_refused = {name: MEANINGS[name] == "fatal" and name not in allowed for name in changed}
    refused = [name for name in changed if is_refused[name] or MEANINGS[name] == "never"]
    if refused:
        raise _refusal(resumed, {name: (old[name], new[name]) for name in refused})

    for name in changed:
        meaning = _meaning(name, config, changed)
        level = logging.INFO if meaning == "free" else logging.WARNING
        message = "changed since step %d: %s %s -> %s (%s)"
        log.log(
            level, message, previous.step, name, to_text(old[name]), to_text(new[name]), meaning
        )

    _say_rate(before, config, previous.step + 1)
    return set(changed)


def _refusal(resumed: Path, refused: dict[str, tuple[Any, Any]]) -> UserError:
    lines = [
        f"{name}: {to_text(old)} there, {to_text(new)} now" for name, (old, new) in refused.items()
    ]
    way_on = "give " + " ".join(f"`allow_change` {name}" for name in refused)
    if any(MEANINGS[name] == "never" for name in refused):
        way_on = f"begin a run with transfer.from: {display_name(resumed)}"

    remedy = "Resume with that run's config and data, start a new run in another directory"
    others = f"other values of {', '.join(refused)}"

    if len(refused) == 1:
        others = f"another value of {lines[0]}"

    what = f"{display_name(resumed)} was trained with {others}"
    return UserError(what, f"{remedy}, or {way_on}", lines if len(lines) > 1 else ())


def _meaning(name: str, config: Resolved, changed: Collection[str]) -> str:
    """What a change of a key means here."""
    meaning = MEANINGS[name]

    if name == "training.max_steps" and "training.schedule_steps" not in changed:
        return "free"

    if name == "training.save_steps" and config.training.on_spike == "rewind":
        return "warned"  # it goes back to other steps

    return "allowed" if meaning == "fatal" else meaning


def _say_rate(before: Config, config: Resolved, step: int) -> None:
    """Warns where the learning rate makes a step at the resume."""
    old = float(learning_rate_schedule(before.training)(step))
    new = float(learning_rate_schedule(config.training)(step))

    # To the digits that are shown: two schedules round differently.
    if f"{old:.4g}" != f"{new:.4g}":
        message = "the learning rate of step %d would have been %.4g, and is now %.4g"
        log.warning(message, step, old, new)
