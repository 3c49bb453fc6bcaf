"""The pure train step and eval step.

Legend: B global batch, T length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l1_jax.config.resolve import Resolved
from l1_jax.objectives.next_token import Batch, batch_loss
from l1_jax.parallel.layout import split_rows
from l1_jax.parallel.sharding import is_only_data, on_each_device
from l1_jax.training.health import judge, rescale, tree_where
from l1_jax.training.schedule import learning_rate_schedule
from l1_jax.training.state import TrainState, Tree, merge, training_key

# What of a batch is for the step itself, not for the loss.
_NOT_FOR_THE_LOSS = ("row_hash", "stop")


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Resolved
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A pure function from (state, batch) to (state, metrics).

    The loss is sum(weight * nll) / sum(weight) over the whole batch, whatever the accumulation and
    the devices. Dropout masks depend on (seed, step, layer, row, position) alone.

    A step whose gradient is not finite, or that `judge` refuses, changes no parameter and no
    moment. Where as many as `training.max_skipped_steps` in a row were refused, or with
    `on_nonfinite: stop` one that was not finite, neither that step nor any after it changes
    anything else: the state waits for the host to notice.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        optimizer: from `create_optimizer`.
        config: of the run.

    Returns:
        A function of a state and a batch: `tokens`, `targets` int32 `[B, T]`, `weights` float32
        `[B, T]`, `row_hash` uint32 `[B]`, `stop` bool `[devices]`, and `segment_ids`, `positions`
        int32 `[B, T]` where documents are kept apart. Its metrics are scalars: `loss`, `grad_norm`
        (before clipping), `learning_rate`, `tokens`, `finite`, `overflow` (of float16, with a scale
        that can become smaller), `spike`, `refused` (steps in a row, this one included),
        `expected_loss`, `batch_hash`, and `stop`: whether any process asks for the end.
    """
    training = config.training
    schedule = learning_rate_schedule(training)
    loss_and_gradient = make_loss_and_gradient(graphdef, config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        total_weight = batch["weights"].sum()
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1.0)
        step_key = jax.random.fold_in(training_key(training.seed, 1), state.step)

        # The loss and its gradient, over all microbatches and devices.
        scaled = loss_and_gradient(state, batch, step_key, scale=scale, total_weight=total_weight)
        value, grads = jax.tree.map(lambda x: x / scale, scaled)
        grad_norm = optax.global_norm(grads)
        learning_rate = schedule(state.step + 1)

        # Can the step be trusted? An overflow is float16's, which a smaller scale mends.
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(value)
        overflow = ~finite & (scale > 1)
        health, spike = judge(state.health, value, finite, overflow, training)
        ended = health.refused >= training.max_skipped_steps
        applied = finite & (health.refused == 0)

        # The update, where it can.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        new = (params, opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = tree_where(applied, new, old)

        # What goes on even without an update.
        loss_scale = rescale(state.loss_scale, finite) if state.loss_scale else None
        waiting = (state.step, state.loss_scale)
        count, loss_scale = tree_where(ended, waiting, (state.step + 1, loss_scale))

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
        new_state = TrainState(
            step=count,
            params=params,
            opt_state=opt_state,
            loss_scale=loss_scale,
            health=health,
            held=state.held,
            beside=state.beside,
        )
        return new_state, metrics

    return train_step


def make_loss_and_gradient(
    graphdef: nnx.GraphDef, config: Resolved
) -> Callable[..., tuple[jax.Array, Tree]]:
    """A function that gives the scaled loss, and its gradient by the trained parameters.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        config: of the run.

    Returns:
        A function of the state, the batch, the key of the step, the loss scale and the total weight
        of the batch.
    """
    accumulation = config.training.gradient_accumulation_steps
    has_dropout = config.model.drops

    def loss(
        params: Tree, held: Tree, micro: Batch, step_key: jax.Array, factor: jax.Array
    ) -> jax.Array:
        # By the row's number in the global batch, so that no division of the batch matters.
        keys_B = None
        if has_dropout:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(step_key, micro["row"])

        nll = batch_loss(graphdef, merge(params, held), micro, keys_B)
        return nll * factor

    def gradient(
        whole: tuple[Tree, Tree, jax.Array, jax.Array], rows: Batch
    ) -> tuple[jax.Array, Tree]:
        """Of the rows; `whole` is the same for all of them."""
        params, held, step_key, factor = whole
        value_and_grad = jax.value_and_grad(loss)
        if accumulation == 1:
            return value_and_grad(params, held, rows, step_key, factor)

        def add(total: Any, micro: Batch) -> tuple[Any, None]:
            of_micro = value_and_grad(params, held, micro, step_key, factor)
            return jax.tree.map(jnp.add, total, of_micro), None

        zero = (jnp.float32(0.0), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, split_rows(rows, accumulation))
        return total

    def loss_and_gradient(
        state: TrainState,
        batch: Batch,
        step_key: jax.Array,
        scale: jax.Array,
        total_weight: jax.Array,
    ) -> tuple[jax.Array, Tree]:
        inputs = {name: x for name, x in batch.items() if name not in _NOT_FOR_THE_LOSS}
        inputs["row"] = jnp.arange(batch["tokens"].shape[0])
        whole = (state.params, state.held, step_key, scale / total_weight)

        # Devices that share nothing but the batch sum what they have accumulated, not each
        # microbatch's. Of a single one XLA sums each layer's gradient as soon as it is there.
        if accumulation > 1 and is_only_data():
            return on_each_device(gradient, whole, inputs)
        return gradient(whole, inputs)

    return loss_and_gradient


def make_eval_step(
    graphdef: nnx.GraphDef,
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """A pure function from (params, batch) to sums.

    Args:
        graphdef: the model's structure, from `transformer.build`.

    Returns:
        A function that gives sum(weight * nll) in nats, sum(weight), and `stop` as in training.
    """

    def eval_step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        nll = batch_loss(graphdef, params, batch)
        return nll, batch["weights"].sum(), batch["stop"].any()

    return eval_step
