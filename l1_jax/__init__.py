"""Train a language model with JAX: from a folder of text to generated text.

In a directory that holds `text.txt`, a sample a line:

>>> import l1_jax
>>> manifest = l1_jax.prepare(["text.txt"], "data", vocab_size=300)
>>> keys = ["data.path=data", "training.output_dir=run", "training.max_steps=2"]
>>> keys += ["training.batch_size=2", "model.max_seq_length=32", "model.n_embd=32"]
>>> config = l1_jax.load_config("tiny", keys)
>>> l1_jax.train(config)
0
>>> evaluation = l1_jax.evaluate("run", "text.txt")
>>> 0 < evaluation.bits_per_byte < 20
True
>>> model = l1_jax.load("run")
>>> (completion,) = l1_jax.generate(model, "The ", max_tokens=3, temperature=0.0)
>>> completion.tokens <= 3
True

The names are imported when they are used: `import l1_jax` itself imports no jax. docs/design.md
says how the package is built.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l1_jax.commands.train import train as train
    from l1_jax.config.schema import Config as Config
    from l1_jax.config.yaml_file import load_config as load_config
    from l1_jax.data.prepare import prepare as prepare
    from l1_jax.errors import RunError as RunError
    from l1_jax.errors import UserError as UserError
    from l1_jax.evaluation.text import evaluate as evaluate
    from l1_jax.inference.generate import generate as generate
    from l1_jax.loading import load as load

__version__ = "0.1.0"

_WHERE = {
    "Config": "l1_jax.config.schema",
    "RunError": "l1_jax.errors",
    "UserError": "l1_jax.errors",
    "evaluate": "l1_jax.evaluation.text",
    "generate": "l1_jax.inference.generate",
    "load": "l1_jax.loading",
    "load_config": "l1_jax.config.yaml_file",
    "prepare": "l1_jax.data.prepare",
    "train": "l1_jax.commands.train",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'l1_jax' has no attribute {name!r}")

    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
