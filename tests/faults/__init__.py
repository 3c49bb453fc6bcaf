"""Fault campaigns: seeded, and each prints the figure that a promise of docs/reliability.md stands on.

A module with a function `campaign(full)` is one: with `full` the whole, otherwise the part that fits into the tests.
`make faults` runs them all, see `__main__.py`.
"""

import os
import sys
from pathlib import Path

# The fault, the bar, the figure, whether the bar is met; None where it could not be tried.
Row = tuple[str, str, str, bool | None]

ROOT = Path(__file__).resolve().parents[2]
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # the user's directory is not to be filled
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
