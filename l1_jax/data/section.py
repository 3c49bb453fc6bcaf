"""The keys of where the tokens come from."""

import dataclasses

from l1_jax.config.key import key


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = key(
        "data/processed",
        "directory, or URL of one, written by scripts/prepare_data.py",
        resume="free",
        is_path=True,
    )
    document_mask: bool = key(
        False, "attention and positions stay inside a document", resume="fatal"
    )
