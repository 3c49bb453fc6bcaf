#!/usr/bin/env python3
"""Writes English text to train a demo on: the documentation that is installed with Python, one

From a checkout; installed, it is `l1 make_demo_corpus`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.commands import interrupts

if __name__ == "__main__":
    interrupts.hear()  # before the imports below, which take a while

    from l1_jax.commands.runner import run

    run("make_demo_corpus")
