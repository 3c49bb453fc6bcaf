"""Train a language model with JAX: from a folder of text to generated text. See docs/design.md."""

__version__ = "0.1.0"
