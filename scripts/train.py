#!/usr/bin/env python3
"""Train a language model: `python scripts/train.py --config FILE.yaml [section.key=value ...]`.

From a checkout; installed, it is `l1 train`.
"""

import os
import signal
import sys
from pathlib import Path


def stop(*_: object) -> None:
    """Ends the process before anything is imported; see `interrupts.hear_before_a_run`."""
    os.write(2, b"stopped by a signal before the first step: run it again, with --resume\n")
    os._exit(75)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from l1_jax.commands.runner import run

    run("train")
