#!/usr/bin/env python3
"""Seconds that a run spent training, without compile, validation and saves: `python training_time.py RUN_DIR`."""

import json
import sys
from pathlib import Path


def training_seconds(run_dir: Path) -> float:
    """Each row of metrics.jsonl gives the tokens since the row before and the rate at which they were trained on."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    seconds, tokens = 0.0, 0
    for row in rows:
        if "train/tokens" in row:
            seconds += (row["train/tokens"] - tokens) / row["perf/tokens_per_second"]
            tokens = row["train/tokens"]
    return seconds


if __name__ == "__main__":
    print(f"{training_seconds(Path(sys.argv[1])):.1f} s of training")
