"""Dropout whose mask belongs to a row's own key, the position and the element, wherever that is computed.

Legend: B batch, T length.
"""

import jax
import jax.numpy as jnp
import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """64 random bits for each counter, all uint32 of shapes that broadcast.

    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405: Threefry-2x32 with 20 rounds, as `jax.random` has it.
    Written out so that XLA makes the bits where they are used; on CPU `jax.random` loops over arrays of them.
    """
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << bits) | (y >> (32 - bits))) ^ x
        x, y = x + keys[(group + 1) % 3], y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def kept(shape: tuple[int, ...], rate: float, keys_B: jax.Array, order_T: np.ndarray, axis: int = 1) -> jax.Array:
    """bool `shape`, `[B, ...]`: False with the probability `rate`. `axis` is that of the positions `order_T`.

    An element's number at its position counts the first of the other dimensions fastest, so that a mask with fewer
    along the last one is the beginning of a longer one.
    """

    def along(numbers: jax.Array | np.ndarray, dim: int) -> jax.Array:
        return jnp.expand_dims(jnp.asarray(numbers, jnp.uint32), [d for d in range(len(shape)) if d != dim])

    number, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
    for dim in range(1, len(shape)):
        if dim != axis:
            number, stride = number + np.uint32(stride) * along(np.arange(shape[dim]), dim), stride * shape[dim]
    words = jax.random.key_data(keys_B)
    bits = threefry((along(words[:, 0], 0), along(words[:, 1], 0)), (along(order_T, axis), number))[0]
    return bits >= np.uint32(rate * 2**32)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, order_T: np.ndarray, axis: int = 1) -> jax.Array:
    """Drops elements of x `[B, ...]` at `rate` and scales the rest by 1 / (1 - rate); without keys it drops nothing.

    `axis` of x is that of the positions, which lie in the order `order_T`. The mask depends on a row's own key and on
    the position alone, so it is the same in any microbatch, on any device and in any order.
    """
    if keys_B is None or rate == 0.0:
        return x
    return jnp.where(kept(x.shape, rate, keys_B, order_T, axis), x / (1.0 - rate), jnp.zeros_like(x))


def fold_in(keys_B: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """`jax.random.fold_in` for each key of `[B]`."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, data)
