"""The pure train step and eval step.

Legend: B global batch, T length.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from l1_jax.config.resolve import Resolved
from l1_jax.model.context import Sums
from l1_jax.objectives.objective import Batch, Objective
from l1_jax.parallel.layout import split_rows
from l1_jax.parallel.sharding import Dims, is_only_data, on_each_device
from l1_jax.training.average import update_average
from l1_jax.training.health import judge, rescale, tree_where
from l1_jax.training.schedule import learning_rate_schedule
from l1_jax.training.state import TrainState, Tree, merge, training_key

# What of a batch is for the step itself, not for the loss.
_NOT_FOR_THE_LOSS = ("row_hash", "stop")

# What the step adds to the fields of a batch: the number of each row.
_ROW_DIMS: Dims = ("batch",)


class Gradient(NamedTuple):
    """What some rows give; sums of it over rows are what more rows give."""

    value: jax.Array  # the loss, float32 scalar
    grads: Tree  # of it, by the trained parameters
    sums: Sums  # the metrics of the objective


class _Fixed(NamedTuple):
    """What the loss needs beside the trained parameters: the same for all rows."""

    held: Tree
    borrowed: Tree
    step_key: jax.Array
    factor: jax.Array  # of the loss: float16's scale over the weight of the batch


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: Resolved,
    objective: Objective,
    dims: Mapping[str, Dims],
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, dict[str, Any]]]:
    """A pure function from (state, borrowed, batch) to (state, metrics).

    The loss is the objective's sum over the whole batch, divided by its weight, whatever the
    accumulation and the devices. Dropout masks depend on (seed, step, layer, row, position) alone.

    A step whose gradient is not finite, or that `judge` refuses, changes no parameter, no moment
    and no average. Where as many as `training.max_skipped_steps` in a row were refused, or with
    `on_nonfinite: stop` one that was not finite, neither that step nor any after it changes
    anything else: the state waits for the host to notice.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        optimizer: from `create_optimizer`.
        config: of the run.
        objective: what is minimised.
        dims: the names of the dimensions of a batch's fields.

    Returns:
        A function of a state, the arrays borrowed from other models, and a batch: the objective's
        fields, `row_hash` uint32 `[B]`, and `stop` bool `[devices]`. Its metrics are scalars:
        `loss`, `grad_norm` (before clipping), `learning_rate`, `tokens`, `finite`, `overflow` (of
        float16, with a scale that can become smaller), `spike`, `refused` (steps in a row, this one
        included), `expected_loss`, `batch_hash`, `stop`: whether any process asks for the end; and
        `terms`, those of the objective by name.
    """
    training = config.training
    schedule = learning_rate_schedule(training)
    loss_and_gradient = make_loss_and_gradient(graphdef, config, objective, dims)

    def train_step(
        state: TrainState, borrowed: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        total_weight = objective.weight(batch)
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1.0)
        step_key = jax.random.fold_in(training_key(training.seed, 1), state.step)

        # The loss and its gradient, over all microbatches and devices.
        factor = scale / total_weight
        scaled = loss_and_gradient(state, borrowed, batch, step_key, factor)
        value, grads = jax.tree.map(lambda x: x / scale, (scaled.value, scaled.grads))
        terms = {name: term.total / term.weight for name, term in scaled.sums.items()}
        grad_norm = optax.global_norm(grads)
        learning_rate = schedule(state.step + 1)

        # Can the step be trusted? An overflow is float16's, which a smaller scale mends.
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(value)
        overflow = ~finite & (scale > 1)
        loss = terms.pop("loss", value)
        health, spike = judge(state.health, loss, finite, overflow, training)
        ended = health.refused >= training.max_skipped_steps
        applied = finite & (health.refused == 0)

        # The update, where it can.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        beside = update_average(state.beside, params, training.ema_decay)
        new = (params, opt_state, beside)
        old = (state.params, state.opt_state, state.beside)
        params, opt_state, beside = tree_where(applied, new, old)

        # What goes on even without an update.
        loss_scale = rescale(state.loss_scale, finite) if state.loss_scale else None
        waiting = (state.step, state.loss_scale)
        count, loss_scale = tree_where(ended, waiting, (state.step + 1, loss_scale))

        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": objective.num_tokens(batch),
            "finite": finite,
            "overflow": overflow,
            "spike": spike,
            "refused": health.refused,
            "expected_loss": state.health.mean,
            "batch_hash": batch["row_hash"].sum(dtype=jnp.uint32),
            "stop": batch["stop"].any(),
            "terms": terms,
        }
        new_state = TrainState(
            step=count,
            params=params,
            opt_state=opt_state,
            loss_scale=loss_scale,
            health=health,
            held=state.held,
            beside=beside,
        )
        return new_state, metrics

    return train_step


def make_loss_and_gradient(
    graphdef: nnx.GraphDef, config: Resolved, objective: Objective, dims: Mapping[str, Dims]
) -> Callable[..., Gradient]:
    """A function that gives the loss and its gradient, both times a factor, and the metrics.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        config: of the run.
        objective: what is minimised.
        dims: the names of the dimensions of a batch's fields.

    Returns:
        A function of the state, what is borrowed, the batch, the key of the step, and the factor.
    """
    accumulation = config.training.gradient_accumulation_steps
    has_dropout = config.model.drops

    def loss(params: Tree, fixed: _Fixed, micro: Batch) -> tuple[jax.Array, Sums]:
        # By the row's number in the global batch, so that no division of the batch matters.
        keys_B = None
        if has_dropout:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(fixed.step_key, micro["row"])

        weights = merge(params, fixed.held)
        terms = objective(graphdef, weights, fixed.borrowed, micro, keys_B)
        return terms.loss * fixed.factor, terms.metrics

    def gradient(whole: tuple[Tree, _Fixed], rows: Batch) -> Gradient:
        """That of some rows; `whole` is the same for all rows."""
        params, fixed = whole

        def of_rows(rows: Batch) -> Gradient:
            (value, sums), grads = jax.value_and_grad(loss, has_aux=True)(params, fixed, rows)
            return Gradient(value, grads, sums)

        if accumulation == 1:
            return of_rows(rows)
        return _sum_over_parts(of_rows, rows, {"row": _ROW_DIMS, **dims}, accumulation)

    def loss_and_gradient(
        state: TrainState, borrowed: Tree, batch: Batch, step_key: jax.Array, factor: jax.Array
    ) -> Gradient:
        inputs = {name: x for name, x in batch.items() if name not in _NOT_FOR_THE_LOSS}
        inputs["row"] = jnp.arange(batch["row_hash"].shape[0])
        whole = (state.params, _Fixed(state.held, borrowed, step_key, factor))

        # Devices that share nothing but the batch sum what they have accumulated, not each
        # microbatch's. Where there is but one microbatch, XLA sums each layer's gradient as soon as
        # it is there.
        if accumulation > 1 and is_only_data():
            return on_each_device(gradient, whole, inputs)
        return gradient(whole, inputs)

    return loss_and_gradient


def _sum_over_parts(
    function: Callable[[Batch], Gradient], rows: Batch, dims: Mapping[str, Dims], count: int
) -> Gradient:
    """The sum of a function over as many parts of the rows, one part at a time."""
    parts = split_rows(rows, {name: dims[name] for name in rows}, count)
    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, first))

    def add(total: Gradient, part: Batch) -> tuple[Gradient, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    total, _ = jax.lax.scan(add, zero, parts)
    return total


class EvalSums(NamedTuple):
    """What an eval step gives of a batch.

    Attributes:
        loss: float32 scalar, the sum that is divided by `weight` at the end.
        weight: float32 scalar.
        stop: bool scalar, as in training.
        log_probs: float32 `[B, T]` of the targets, where the step gives them.
    """

    loss: jax.Array
    weight: jax.Array
    stop: jax.Array
    log_probs: jax.Array | None = None


# A pure function of parameters, what is borrowed, and a batch.
EvalStep = Callable[[Tree, Tree, Batch], EvalSums]


def make_eval_step(graphdef: nnx.GraphDef, objective: Objective) -> EvalStep:
    """An eval step of the objective's own validation.

    Args:
        graphdef: the model's structure, from `transformer.build`.
        objective: of the run.
    """

    def eval_step(params: Tree, borrowed: Tree, batch: Batch) -> EvalSums:
        loss = objective.validate(graphdef, params, borrowed, batch)
        return EvalSums(loss.total, loss.weight, batch["stop"].any())

    return eval_step
