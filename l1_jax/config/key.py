"""A key of the config knows all about itself."""

import dataclasses
from typing import Any

MAX_STEPS, MAX_BATCH = 2**31 - 1, 2**22  # the counter of steps is an int32; sequences of a step


def key(default: Any, doc: str, *, is_path: bool = False, **limits: Any) -> Any:
    """A config key. `limits`: `ge`, `gt`, `le` and `lt`, named as in Python's `operator`."""
    metadata = {"doc": doc, "limits": limits, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)
