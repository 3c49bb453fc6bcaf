"""The pure train step and eval step.

Legend: A accumulation (microbatches), B global batch, T length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l1_jax.parallel.sharding import constrain
from l1_jax.training.loss import choose_num_chunks, loss_sum
from l1_jax.training.state import LossScale, TrainState, training_key

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

LOSS_SCALE_GROWTH_STEPS = 2000


def microbatches(batch: Batch, count: int) -> Batch:
    """`[B, ...]` -> `[A, B/A, ...]`: microbatch a has the rows congruent to a, so no row leaves its device."""

    def divide(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(divide, batch)


def batch_loss(graphdef: nnx.GraphDef, params: Any, batch: Batch, keys_B: jax.Array | None, shards: int) -> jax.Array:
    """sum(weight * nll) of one microbatch, float32."""
    model = nnx.merge(graphdef, params)
    x_BTD, _ = model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), keys_B)
    rows, length = batch["tokens"].shape
    num_chunks = choose_num_chunks(rows // shards, length, params["token_embedding"].shape[0])
    return loss_sum(model, x_BTD, batch["targets"], batch["weights"], num_chunks)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    dropout: float,
    accumulation: int,
    shards: int,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function from (state, batch) to (state, metrics).

    The batch holds `tokens`, `targets` int32 `[B, T]`, `weights` float32 `[B, T]`, `row_hash` uint32 `[B]`, and
    `segment_ids`, `positions` int32 `[B, T]` where documents are kept apart. The loss is sum(weight * nll) /
    sum(weight) over the whole batch, whatever the accumulation and the devices. A step whose gradient is not finite
    changes nothing but the step's number (and the loss scale).

    Args:
        seed: of dropout; a row's masks depend on (seed, step, layer, row) alone.
        accumulation: microbatches per step, one after the other.
        shards: devices over which a batch is divided, for the size of the logits.

    Metrics (scalars): `loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, `finite`, `batch_hash`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = jnp.arange(batch["tokens"].shape[0])
        total_weight = batch["weights"].sum()
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1.0)
        step_key = jax.random.fold_in(training_key(seed, 1), state.step)

        def loss(params: Any, micro: Batch) -> jax.Array:
            keys_B = jax.vmap(lambda row: jax.random.fold_in(step_key, row))(micro["row"]) if dropout else None
            return batch_loss(graphdef, params, micro, keys_B, shards) * (scale / total_weight)

        micro = {name: x for name, x in batch.items() if name != "row_hash"} | {"row": rows}
        if accumulation == 1:
            value, grads = jax.value_and_grad(loss)(state.params, micro)
        else:

            def add(total: Any, one: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(state.params, one)), None

            zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, state.params))
            (value, grads), _ = jax.lax.scan(add, zero, microbatches(micro, accumulation))

        grads = jax.tree.map(lambda g: g / scale, grads)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(value)
        learning_rate = schedule(state.step + 1)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        new_state = TrainState(state.step + 1, params, opt_state, _rescale(state.loss_scale, finite))
        metrics = {
            "loss": value / scale,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": total_weight,
            "finite": finite,
            "batch_hash": batch["row_hash"].sum(dtype=jnp.uint32),
        }
        return new_state, metrics

    return train_step


def _rescale(state: LossScale | None, finite: jax.Array) -> LossScale | None:
    """Halves the scale after an overflow, doubles it after many finite steps."""
    if state is None:
        return None
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= LOSS_SCALE_GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), jnp.maximum(state.scale / 2, 1.0))
    return LossScale(scale, jnp.where(grow, 0, good))


def make_eval_step(graphdef: nnx.GraphDef, shards: int) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A pure function from (params, batch) to (sum(weight * nll) in nats, sum(weight))."""

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return batch_loss(graphdef, params, batch, None, shards), batch["weights"].sum()

    return eval_step
