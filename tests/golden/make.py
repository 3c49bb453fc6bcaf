"""Makes the golden checkpoint of this version, which every later one has to read: `python tests/golden/make.py`.

To be run once, when a version is released, and never again for it.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import jax
import jax.numpy as jnp
import numpy as np
from faults.corruption import small_run
from flax import nnx

from l1_jax import __version__
from l1_jax.loading import load_model

TOKENS = [[256, 97, 32, 108]]  # end of text, "a l"


def logits(checkpoint: Path) -> np.ndarray:
    """[1, T, V] for TOKENS, float32, of a checkpoint that is read as users do."""
    model = load_model(checkpoint, jax.devices()[:1])
    network = nnx.merge(model.graphdef, model.params)
    with jax.set_mesh(model.mesh):
        return np.asarray(network.logits(network(jnp.array(TOKENS))[0]))[
            ..., : model.tokenizer.vocab_size
        ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        target = HERE / __version__
        target.mkdir()
        shutil.copytree(small_run(Path(home)) / "checkpoint-6", target / "checkpoint")
        values = [
            [f"{x:.9g}" for x in row] for row in logits(target / "checkpoint")[0]
        ]  # 9 digits are a float32
        (target / "logits.json").write_text(json.dumps(values, indent=0) + "\n")
