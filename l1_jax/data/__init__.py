"""Text on disk -> batch(step). Nothing here imports jax."""
