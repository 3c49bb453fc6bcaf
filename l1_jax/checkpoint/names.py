"""The grammar of names: what a run, a checkpoint and its files are called."""

import itertools
import re
from pathlib import Path

METRICS_FILE, SKIPPED_FILE = "metrics.jsonl", "skipped.jsonl"


INFO_FILE, BEST, RUN_FILE = "checkpoint.json", "best_model", "run.json"  # the first is a checkpoint's marker
LOG_DIRECTORIES = ("tensorboard", "wandb")
ORIGIN_FILE = ".origin"  # in a local checkpoint without arrays: the URL where they are
CHECKPOINT_NAME = re.compile(rf"((aside|damaged)-)?(checkpoint-\d+|nonfinite-\d+|{BEST}(-\d+)?)(\.\d+)?")
BEST_NAME = re.compile(rf"{BEST}(-\d+)?")


MANIFEST_FILE = "manifest.json"


BUNDLE = "nonfinite"  # `nonfinite-<step>`: what is needed to do again a step that was not finite
CONFIG_FILE, TOKENIZER_FILE = "config.yaml", "tokenizer.json"


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, good or damaged; a stray one has neither of the two files."""
    return (path / INFO_FILE).is_file() or (path / MANIFEST_FILE).is_file()


def step_directories(run_dir: Path, kind: str = "checkpoint") -> dict[int, Path]:
    """The checkpoints of a run by their step, ascending; or its bundles."""
    paths = [path for path in run_dir.glob(f"{kind}-*") if is_checkpoint(path)]
    found = {int(m[1]): path for path in paths if (m := re.fullmatch(rf"{kind}-(\d+)", path.name))}
    return dict(sorted(found.items()))


def set_aside(path: Path, prefix: str) -> Path:
    """Renames a directory to `<prefix>-<name>.<n>`, which no command takes for a checkpoint; returns the new path."""
    names = (path.with_name(f"{prefix}-{path.name}.{n}") for n in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


REPORT_FILE = "report.json"


LOCK_FILE = "run.lock"
FILES = (CONFIG_FILE, METRICS_FILE, SKIPPED_FILE, RUN_FILE)
