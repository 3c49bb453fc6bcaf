"""l1_jax: train a language model with JAX, from a folder of text to generated text.

A training run is a pure function of (config, data, seed): see `docs/design.md`.
"""

__version__ = "0.1.0"
