"""The device mesh, and what is placed where on it."""
