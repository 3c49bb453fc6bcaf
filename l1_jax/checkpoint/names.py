"""The grammar of names: what a run, its checkpoints and their files are called.

```
checkpoint-<step>                    a checkpoint of a run
best_model                           the one with the lowest validation loss
best_model-<step>                    the same in object storage, where nothing is renamed
nonfinite-<step>                     what is needed to do again a step that was not finite
aside-<name>.<n>, damaged-<name>.<n> what no command takes for a checkpoint any more
.saving-<step>, .old-<name>, .deleting-<name>    on the way; cleared at the next start
```
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

# A checkpoint's files; its arrays lie below `state`, an item a tree.
INFO_FILE = "checkpoint.json"  # the marker: without it a directory in object storage does not exist
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"
REPORT_FILE = "report.json"  # of a bundle: the step that was not finite
ARRAYS = "state"
ORIGIN_FILE = ".origin"  # in a stand-in without arrays: the URL where they are

# A run's files.
RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
METRICS_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped.jsonl"
RUN_FILES = (CONFIG_FILE, METRICS_FILE, SKIPPED_FILE, RUN_FILE)
LOG_DIRECTORIES = ("tensorboard", "wandb")

# Kinds of checkpoints.
STEP = "checkpoint"
BEST = "best_model"
BUNDLE = "nonfinite"

# Prefixes of what is no checkpoint any more, or not yet.
ASIDE = "aside"
DAMAGED = "damaged"
SAVING = ".saving"
OLD = ".old"
DELETING = ".deleting"

_KINDS = rf"({STEP}-\d+|{BUNDLE}-\d+|{BEST}(-\d+)?)"
_ANY = re.compile(rf"(({ASIDE}|{DAMAGED})-)?{_KINDS}(\.\d+)?")
_VERIFIED = re.compile(rf"({ASIDE}-)?({STEP}-\d+|{BUNDLE}-\d+|{BEST})(\.\d+)?")
_REMOTE_BEST = re.compile(rf"{BEST}(-\d+)?")


def step_name(step: int) -> str:
    """The name of a run's checkpoint."""
    return f"{STEP}-{step}"


def bundle_name(step: int) -> str:
    """The name of what is needed to do a step again."""
    return f"{BUNDLE}-{step}"


def saving_name(name: str | int) -> str:
    """Where what is to be called so is written until it is whole; of a run's, the step."""
    return f"{SAVING}-{name}"


def remote_name(name: str, step: int) -> str:
    """What a checkpoint of that step is called in object storage."""
    return f"{BEST}-{step}" if name == BEST else name


def is_run_checkpoint(name: str) -> bool:
    """Whether a run gives such a name to a checkpoint, a damaged or superseded one included."""
    return _ANY.fullmatch(name) is not None


def is_verified_name(name: str) -> bool:
    """Whether a directory of that name in a run is looked at for damage."""
    return _VERIFIED.fullmatch(name) is not None


def is_remote_best(name: str) -> bool:
    """Whether a name in object storage is that of a best model."""
    return _REMOTE_BEST.fullmatch(name) is not None


def step_of_name(name: str) -> int | None:
    """The step of a name `checkpoint-<step>`; None of any other."""
    match = re.fullmatch(rf"{STEP}-(\d+)", name)
    return int(match[1]) if match else None


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, good or damaged; a stray one has neither of the two."""
    return (path / INFO_FILE).is_file() or (path / MANIFEST_FILE).is_file()


def step_directories(run_dir: Path, kind: str = STEP) -> dict[int, Path]:
    """The checkpoints of a run by their step, ascending; or its bundles."""
    found = {}

    for path in run_dir.glob(f"{kind}-*"):
        match = re.fullmatch(rf"{kind}-(\d+)", path.name)
        if match and is_checkpoint(path):
            found[int(match[1])] = path

    return dict(sorted(found.items()))


def set_aside(path: Path, prefix: str) -> Path:
    """Renames a directory to `<prefix>-<name>.<n>`, which no command takes for a checkpoint;
    returns the new path."""
    names = (path.with_name(f"{prefix}-{path.name}.{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def interrupted(run_dir: Path) -> Iterator[Path]:
    """What an interrupted save or deletion left behind."""
    yield from run_dir.glob(f"{SAVING}-[0-9]*")

    for path in run_dir.glob(f"{DELETING}-*"):
        name = path.name.removeprefix(f"{DELETING}-")
        if is_run_checkpoint(name) or name.partition(".")[0] in LOG_DIRECTORIES:
            yield path


def replaced(run_dir: Path) -> Iterator[Path]:
    """The names whose old holder is still there, for its replacement was interrupted."""
    for pattern in (f"{OLD}-{BEST}", f"{OLD}-{STEP}-[0-9]*", f"{OLD}-{BUNDLE}-[0-9]*"):
        for old in run_dir.glob(pattern):
            yield run_dir / old.name.removeprefix(f"{OLD}-")
