"""The keys of how text is sampled."""

import dataclasses

from l1_jax.config.key import key


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How text is drawn, where a call does not say it."""

    temperature: float = key(1.0, "divides the logits; 0 is greedy", resume="free", ge=0.0)
    top_k: int | None = key(None, "sample among the k most likely tokens", resume="free", ge=1)
    top_p: float | None = key(
        None,
        "sample among the fewest tokens whose probabilities sum to p",
        resume="free",
        gt=0.0,
        le=1.0,
    )
    min_p: float | None = key(
        None,
        "drop tokens less likely than this share of the likeliest",
        resume="free",
        ge=0.0,
        le=1.0,
    )
    repetition_penalty: float = key(
        1.0, "above 1, tokens already there become less likely", resume="free", gt=0.0
    )
