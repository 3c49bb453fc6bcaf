"""The pure train step and eval step.

Legend: B global batch, T length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l1_jax.config.schema import Config
from l1_jax.objectives.next_token import Batch, batch_loss
from l1_jax.parallel.layout import split_rows
from l1_jax.parallel.sharding import is_only_data, on_each_device
from l1_jax.training.health import judge, rescale, tree_where
from l1_jax.training.schedule import learning_rate_schedule
from l1_jax.training.state import TrainState, training_key


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Config
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A pure function from (state, batch) to (state, metrics); `config` is resolved.

    The batch holds `tokens`, `targets` int32 `[B, T]`, `weights` float32 `[B, T]`, `row_hash` uint32 `[B]`, `stop`
    bool `[devices]`, and `segment_ids`, `positions` int32 `[B, T]` where documents are kept apart. The loss is
    sum(weight * nll) / sum(weight) over the whole batch, whatever the accumulation and the devices; dropout masks
    depend on (seed, step, layer, row, position) alone. A step whose gradient is not finite, or that `judge` refuses,
    changes no parameter and no moment. Where as many as `training.max_skipped_steps` in a row were refused, or with
    `on_nonfinite: stop` one that was not finite, neither that step nor any after it changes anything else: the state
    waits for the host to notice.

    Metrics are scalars: `loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, `finite`, `overflow`
    (of float16, with a scale that can become smaller), `spike`, `refused` (steps in a row, this one included),
    `expected_loss`, `batch_hash`, and `stop`: whether any process asks for the end.
    """
    training = config.training
    schedule, accumulation = learning_rate_schedule(training), training.gradient_accumulation_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        total_weight = batch["weights"].sum()
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1.0)
        step_key = jax.random.fold_in(training_key(training.seed, 1), state.step)

        def loss(params: Any, micro: Batch, step_key: jax.Array, factor: jax.Array) -> jax.Array:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(step_key, micro["row"]) if config.model.dropout else None
            return batch_loss(graphdef, params, micro, keys_B) * factor

        def gradient(whole: tuple[Any, jax.Array, jax.Array], rows: Batch) -> tuple[jax.Array, Any]:
            params, *more = whole
            if accumulation == 1:
                return jax.value_and_grad(loss)(params, rows, *more)

            def add(total: Any, micro: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, micro, *more)), None

            zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
            return jax.lax.scan(add, zero, split_rows(rows, accumulation))[0]

        inputs = {name: x for name, x in batch.items() if name not in ("row_hash", "stop")}
        inputs["row"] = jnp.arange(batch["tokens"].shape[0])
        whole = (state.params, step_key, scale / total_weight)
        # Devices that share nothing but the batch sum what they have accumulated, not each microbatch's. Of a single
        # one XLA sums each layer's gradient as soon as it is there.
        if accumulation > 1 and is_only_data():
            value, grads = on_each_device(gradient, whole, inputs)
        else:
            value, grads = gradient(whole, inputs)
        value, grads = jax.tree.map(lambda x: x / scale, (value, grads))
        grad_norm, learning_rate = optax.global_norm(grads), schedule(state.step + 1)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(value)
        overflow = ~finite & (scale > 1)  # float16's, which a smaller scale mends
        health, spike = judge(state.health, value, finite, overflow, training)
        ended, applied = health.refused >= training.max_skipped_steps, finite & (health.refused == 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        params, opt_state = tree_where(applied, (params, opt_state), (state.params, state.opt_state))
        loss_scale = rescale(state.loss_scale, finite) if state.loss_scale else None
        count, loss_scale = tree_where(ended, (state.step, state.loss_scale), (state.step + 1, loss_scale))
        metrics = {
            "loss": value,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": total_weight,
            "finite": finite,
            "overflow": overflow,
            "spike": spike,
            "refused": health.refused,
            "expected_loss": state.health.mean,
            "batch_hash": batch["row_hash"].sum(dtype=jnp.uint32),
            "stop": batch["stop"].any(),
        }
        return TrainState(count, params, opt_state, loss_scale, health), metrics

    return train_step


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """A pure function from (params, batch) to (sum(weight * nll) in nats, sum(weight), `stop` as in training)."""
    return lambda params, batch: (batch_loss(graphdef, params, batch), batch["weights"].sum(), batch["stop"].any())
