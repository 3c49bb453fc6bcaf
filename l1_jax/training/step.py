"""The pure train step and eval step.

Legend: B global batch, T length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l1_jax.config import Config, TrainingConfig
from l1_jax.parallel.sharding import is_only_data, num_parts, on_each_device, split_rows
from l1_jax.training.loss import choose_num_chunks, loss_sum
from l1_jax.training.schedule import learning_rate_schedule
from l1_jax.training.state import Health, LossScale, TrainState, training_key

Batch = dict[str, jax.Array]
LOSS_SCALE_GROWTH_STEPS = 2000
# The estimate of the loss: how many steps it remembers, how many it wants before it calls a loss a spike, and at how
# many deviations a loss is clipped before it is taken in, so that one outlier does not move it much.
ESTIMATE_STEPS, ESTIMATE_WARMUP, ESTIMATE_CLIP = 100, 50, 3.0


def batch_loss(graphdef: nnx.GraphDef, params: Any, batch: Batch, keys_B: jax.Array | None = None) -> jax.Array:
    """sum(weight * nll) of a (micro)batch, float32."""
    model = nnx.merge(graphdef, params)
    x_BTD, _ = model(batch["tokens"], batch.get("positions"), batch.get("segment_ids"), keys_B)
    rows, length = batch["tokens"].shape
    vocab = params["token_embedding"].shape[0]
    num_chunks = choose_num_chunks(rows // num_parts("batch"), length // num_parts("length"), vocab)
    return loss_sum(model, x_BTD, batch["targets"], batch["weights"], num_chunks)


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
        params, opt_state = _choose(applied, (params, opt_state), (state.params, state.opt_state))
        loss_scale = rescale(state.loss_scale, finite) if state.loss_scale else None
        count, loss_scale = _choose(ended, (state.step, state.loss_scale), (state.step + 1, loss_scale))
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


def _choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def judge(
    health: Health, loss: jax.Array, finite: jax.Array, overflow: jax.Array, training: TrainingConfig
) -> tuple[Health, jax.Array]:
    """What a step's loss makes of the estimate of the loss, whether it is refused, and whether it is a spike.

    The estimate is an exponentially weighted mean and mean absolute deviation. A spike is a loss that is more than
    `training.spike_threshold` deviations above the mean; it is refused unless `on_spike` is warn. What is not finite is
    refused, but for an `overflow` of float16. `refused` counts refused steps in a row; one that is to stop the run at
    once counts for all that may be.
    """
    limit, mean = training.max_skipped_steps, jnp.where(health.seen > 0, health.mean, loss)
    excess = loss - mean
    ended, known = health.refused >= limit, health.seen >= ESTIMATE_WARMUP
    spike = finite & known & (excess > training.spike_threshold * health.deviation)
    bound = jnp.where(known, ESTIMATE_CLIP * health.deviation, jnp.inf)
    clipped, rate = jnp.clip(excess, -bound, bound), jnp.maximum(1 / (health.seen + 1), 1 / ESTIMATE_STEPS)
    deviation = health.deviation + rate * (jnp.abs(clipped) - health.deviation)
    taken = Health(mean + rate * clipped, deviation, health.seen + 1, health.refused)

    cost = jnp.where(finite, 1, limit if training.on_nonfinite == "stop" else 1)
    refuse = (~finite & ~overflow) | (spike & (training.on_spike != "warn"))
    refused = jnp.where(refuse, health.refused + cost, jnp.where(finite, 0, health.refused))
    refused = jnp.where(ended, health.refused, refused)
    return dataclasses.replace(_choose(finite & ~ended, taken, health), refused=refused), spike


def rescale(state: LossScale, finite: jax.Array) -> LossScale:
    """Halves the scale after an overflow, doubles it after many finite steps."""
    good = jnp.where(finite, state.good_steps + 1, 0)
    grow = good >= LOSS_SCALE_GROWTH_STEPS
    scale = jnp.where(finite, jnp.where(grow, state.scale * 2, state.scale), jnp.maximum(state.scale / 2, 1.0))
    return LossScale(scale, jnp.where(grow, 0, good))


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """A pure function from (params, batch) to (sum(weight * nll) in nats, sum(weight), `stop` as in training)."""
    return lambda params, batch: (batch_loss(graphdef, params, batch), batch["weights"].sum(), batch["stop"].any())
