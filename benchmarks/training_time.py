#!/usr/bin/env python3
"""Seconds that a run spent training, without compile, validation and saves: `python training_time.py RUN_DIR`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.commands.flags import Parser
from l1_jax.commands.runner import run_command
from l1_jax.errors import UserError


def training_seconds(run_dir: Path) -> float:
    """Each row of metrics.jsonl gives the tokens since the row before and the rate at which they were trained on."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds, tokens = 0.0, 0
    for row in rows:
        if "train/tokens" in row:
            seconds += (row["train/tokens"] - tokens) / row["perf/tokens_per_second"]
            tokens = row["train/tokens"]
    return seconds


def main(argv: list[str]) -> int:
    parser = Parser("Seconds that a run spent training, without compile, validation and saves.")
    parser.add_argument(
        "run_dir", type=Path, metavar="RUN_DIR", help="training.output_dir of the run"
    )
    run_dir = parser.parse_args(argv).run_dir
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(
            f"{run_dir} holds no metrics.jsonl", "Name the training.output_dir of a run"
        )
    print(f"{training_seconds(run_dir):.1f} s of training")
    return 0


if __name__ == "__main__":
    run_command(main)
