"""Dropout whose mask belongs to a row's own key, the position and the element.

So the mask is the same wherever it is computed.

Legend: B batch, T length.
"""

import jax
import jax.numpy as jnp
import numpy as np

# By how many bits each round of Threefry turns a word: four rounds, then the other four.
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

# The constant of Threefry's key schedule.
PARITY = np.uint32(0x1BD11BDA)

# 64 bits: two arrays of uint32, of shapes that broadcast.
Words = tuple[jax.Array, jax.Array]


def threefry(key: Words, counter: Words) -> Words:
    """64 random bits for each counter.

    Written out so that XLA makes the bits where they are used; on CPU `jax.random` loops over
    arrays of them.

    Source: Salmon et al. 2011, doi:10.1145/2063384.2063405: Threefry-2x32 with 20 rounds, as
    `jax.random` has it.
    """
    keys = (*key, key[0] ^ key[1] ^ PARITY)
    x = counter[0] + keys[0]
    y = counter[1] + keys[1]

    for group in range(5):
        for bits in ROTATIONS[group % 2]:
            x = x + y
            turned = (y << bits) | (y >> (32 - bits))
            y = turned ^ x

        # After every four rounds the next two words of the key go in, and the number of the group.
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def kept(
    shape: tuple[int, ...], rate: float, keys_B: jax.Array, order_T: np.ndarray, axis: int = 1
) -> jax.Array:
    """The mask of `dropout`: bool `shape`, False with the probability `rate`.

    An element's number at its position counts the first of the other dimensions fastest, so that a
    mask with fewer along the last one is the beginning of a longer one.

    Args:
        shape: `[B, ...]`.
        rate: from 0 to below 1.
        keys_B: a key for each row.
        order_T: the positions, in the order in which they lie.
        axis: the dimension along which they lie.
    """

    def along(numbers: jax.Array | np.ndarray, dim: int) -> jax.Array:
        """`numbers` as uint32 along one dimension, 1 in the others."""
        others = [other for other in range(len(shape)) if other != dim]
        return jnp.expand_dims(jnp.asarray(numbers, jnp.uint32), others)

    # The element's number at its position.
    number = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for dim, size in enumerate(shape):
        if dim in (0, axis):
            continue
        number = number + np.uint32(stride) * along(np.arange(size), dim)
        stride *= size

    words_B2 = jax.random.key_data(keys_B)
    key = (along(words_B2[:, 0], dim=0), along(words_B2[:, 1], dim=0))
    position = along(order_T, dim=axis)
    bits, _ = threefry(key, counter=(position, number))

    # Uniform over 32 bits, so below this with the probability `rate`.
    threshold = np.uint32(rate * 2**32)
    return bits >= threshold


def dropout(
    x: jax.Array, rate: float, keys_B: jax.Array | None, order_T: np.ndarray, axis: int = 1
) -> jax.Array:
    """Drops elements of x at `rate` and scales the rest by 1 / (1 - rate).

    The mask depends on a row's own key and on the position alone, so it is the same in any
    microbatch, on any device and in any order.

    Args:
        x: `[B, ...]`.
        rate: from 0 to below 1.
        keys_B: a key for each row; None drops nothing.
        order_T: the positions, in the order in which they lie.
        axis: the dimension of x along which they lie.
    """
    if keys_B is None or rate == 0.0:
        return x

    mask = kept(x.shape, rate, keys_B, order_T, axis)
    scaled = x / (1.0 - rate)
    return jnp.where(mask, scaled, jnp.zeros_like(x))


def fold_in(keys_B: jax.Array | None, data: int | jax.Array) -> jax.Array | None:
    """`jax.random.fold_in` for each key of `[B]`."""
    if keys_B is None:
        return None
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, data)
