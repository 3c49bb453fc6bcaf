#!/usr/bin/env python3
"""What a run needs and costs on devices that are not here: `python scripts/plan.py --config FILE

From a checkout; installed, it is `l1 plan`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.commands import interrupts

if __name__ == "__main__":
    interrupts.hear()  # before the imports below, which take a while

    from l1_jax.commands.runner import run

    run("plan")
