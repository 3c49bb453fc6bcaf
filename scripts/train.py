#!/usr/bin/env python3
"""Train a language model: `python scripts/train.py --config FILE.yaml [section.key=value ...]`.

From a checkout; installed, it is `l1 train`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.commands import interrupts

if __name__ == "__main__":
    interrupts.hear_before_a_run()  # before the imports below, which take a while

    from l1_jax.commands.runner import run

    run("train")
