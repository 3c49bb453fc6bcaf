"""The learning-rate schedule and the optimizer."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from l1_jax.config import TrainingConfig
from l1_jax.errors import UserError
from l1_jax.parallel.sharding import constrain, num_parts

MUON_MOMENTUM, MUON_ITERATIONS = 0.95, 5  # Jordan et al. 2024, as in their Muon
STACKED = ("layers", "qkv", "gate")  # dimensions along which matrices of their own lie
Dims = tuple[int, ...]


def resolve_warmup(warmup_steps: int | str, schedule_steps: int) -> int:
    """Warm-up in steps; `auto` is min(500, 10 % of the schedule). UserError where it leaves nothing of the schedule."""
    if isinstance(warmup_steps, str):
        return min(500, schedule_steps // 10)
    if warmup_steps >= schedule_steps:
        what = f"training.warmup_steps {warmup_steps} is not below the {schedule_steps} steps of the schedule"
        raise UserError(what, "Set training.warmup_steps: auto, or train for longer")
    return warmup_steps


def check_decay(config: TrainingConfig) -> None:
    """Raises UserError where the warm-up reaches into the decay of wsd. `config` has its steps resolved."""
    assert isinstance(config.warmup_steps, int)
    assert config.schedule_steps
    if config.schedule == "wsd" and config.warmup_steps > config.schedule_steps - decay_steps(config):
        what = f"training.warmup_steps {config.warmup_steps} and the {decay_steps(config)} steps in which wsd decays"
        remedy = "Lower training.warmup_steps or training.decay_fraction, or train for longer"
        raise UserError(f"{what} are more than the {config.schedule_steps} of the schedule", remedy)


def decay_steps(config: TrainingConfig) -> int:
    """In which wsd decays; `config` is resolved."""
    assert config.schedule_steps
    return max(1, round(config.decay_fraction * config.schedule_steps))


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Step's number, 1 for the first, -> its learning rate: linear warm-up, then a cosine to the floor at
    `schedule_steps`, or the peak and a linear decay to that floor, where it stays. `config` is resolved.

    Source of wsd: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, eq. 1; linear: Hägele et al. 2024, arXiv:2405.18392.
    """
    peak, floor = config.learning_rate, config.min_learning_rate
    assert config.schedule_steps
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, config.schedule_steps, floor)
    start = config.schedule_steps - decay_steps(config)
    parts = [
        optax.linear_schedule(0.0, peak, config.warmup_steps),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, floor, decay_steps(config)),
    ]
    return optax.join_schedules(parts, [config.warmup_steps, start])


def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
    """Whether weight decay applies: to matrices and token embeddings, not to biases, norms and positions."""
    return path[-1].key in ("kernel", "token_embedding", "head")


def matrix_dims(axes: tuple[str, ...]) -> tuple[Dims, Dims]:
    """Which dimensions of a parameter, by their names, are the inputs and which the outputs of a linear map; none of a
    vector's are. The others, `STACKED`, number the maps."""
    own = tuple(dim for dim, name in enumerate(axes) if name not in STACKED)
    if "embed" not in axes or len(own) == 1:
        return (), ()
    return (own[:1], own[1:]) if axes[own[0]] == "embed" else (own[:-1], own[-1:])


def create_optimizer(config: TrainingConfig, axes: Any = None) -> optax.GradientTransformation:
    """Clipping, then the optimizer without its learning rate: the step multiplies by -rate(step), also after skipped
    updates. What has a rate of its own is multiplied by its ratio to `learning_rate` here.

    `axes`, from `transformer.build`, name the parameters' dimensions; AdamW and Lion do without.
    Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Lion, Chen et al. 2023, arXiv:2302.06675,
    algorithm 2; Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    moment = jnp.dtype(config.moment_dtype)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=moment)
    decay = optax.add_decayed_weights(
        config.weight_decay, lambda params: jax.tree_util.tree_map_with_path(decays, params)
    )
    if config.optimizer == "muon":
        groups = {"muon": _muon(config, axes, decay), "adamw": optax.chain(adam, decay)}
        return optax.chain(
            clip, optax.partition(groups, _map_axes(lambda a: "muon" if _is_muons(a) else "adamw", axes))
        )
    if config.optimizer == "adafactor":
        scale = scale_by_factored_moment(axes)
    else:
        scale = optax.scale_by_lion(config.beta1, config.beta2, moment) if config.optimizer == "lion" else adam
    return optax.chain(clip, scale, decay)


def _map_axes(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _is_muons(axes: tuple[str, ...]) -> bool:
    """The matrices of the blocks are, tables (embeddings, positions, the head) are not."""
    return axes[0] == "layers" and matrix_dims(axes) != ((), ())


def _muon(config: TrainingConfig, axes: Any, decay: optax.GradientTransformation) -> optax.GradientTransformation:
    """Momentum made nearly orthogonal, each matrix by itself, times sqrt(max(1, outputs / inputs)).

    Devices that share the parameters exchange parts of matrices for whole ones, so that the iterations do without.
    """

    def of_matrices(function: Any) -> Any:
        return _map_axes(lambda names: function(names) if _is_muons(names) else optax.MaskedNode(), axes)

    names = of_matrices(lambda names: names)
    dims = of_matrices(lambda names: contrib.MuonDimensionNumbers(*matrix_dims(names)))
    # Without momentum it is the orthogonalisation alone.
    orthogonalise = contrib.scale_by_muon(
        ns_steps=MUON_ITERATIONS, beta=0.0, nesterov=False, weight_dimension_numbers=dims
    )

    def places(names: tuple[str, ...]) -> list[tuple[str | None, ...]]:
        """From parts of each matrix to whole ones; XLA exchanges over one axis of the mesh at a time."""
        first = tuple(None if name == "embed" else name for name in names[1:])
        return [names, ("matrices_by_width", *first), ("matrices", *(None for _ in first))]

    def gather(update: jax.Array, names: tuple[str, ...]) -> jax.Array:
        more = -len(update) % num_parts("matrices")  # so that each device has as many
        padded = jnp.pad(update, [(0, more)] + [(0, 0)] * (update.ndim - 1))
        return functools.reduce(lambda x, place: constrain(x, *place), places(names), padded)

    def scatter(update: jax.Array, names: tuple[str, ...], whole: jax.Array) -> jax.Array:
        inputs, outputs = (math.prod(update.shape[dim] for dim in side) for side in matrix_dims(names))
        parts = functools.reduce(lambda x, place: constrain(x, *place), reversed(places(names)), whole)
        return parts[: len(update)] * math.sqrt(max(1.0, outputs / inputs))

    def orthogonal(momentum: Any, _: Any) -> Any:
        whole = jax.tree.map(gather, momentum, names)
        return jax.tree.map(scatter, momentum, names, orthogonalise.update(whole, orthogonalise.init(whole))[0])

    return optax.chain(
        optax.trace(MUON_MOMENTUM, nesterov=True, accumulator_dtype=jnp.dtype(config.moment_dtype)),
        optax.stateless(orthogonal),
        decay,
        optax.scale(config.muon_learning_rate / config.learning_rate),
    )


def muon_flops(params: Any, axes: Any) -> int:
    """Of a step's orthogonalisations: X X', its square, and their sum times X, in each iteration."""

    def one(leaf: Any, names: tuple[str, ...]) -> int:
        if not _is_muons(names):
            return 0
        small, large = sorted(math.prod(leaf.shape[dim] for dim in dims) for dims in matrix_dims(names))
        return leaf.size // (small * large) * MUON_ITERATIONS * (4 * small**2 * large + 2 * small**3)

    return sum(jax.tree.leaves(jax.tree.map(one, params, axes)))


class FactoredState(NamedTuple):
    """Running means of squared gradients over the outputs of a matrix and over its inputs; what was averaged over has
    size 1. Of a vector both are the whole."""

    steps: jax.Array  # int32 scalar
    rows: Any
    columns: Any


def scale_by_factored_moment(axes: Any) -> optax.GradientTransformation:
    """Adafactor without first moment and relative step; each matrix by itself, also of several in an array.

    Source: Shazeer & Stern 2018, arXiv:1804.04235, algorithms 4 and 5, section 7.2 (decay 1 - t^-0.8); update clipping
    at 1, section 6. (optax factors an array's two largest dimensions, here often heads of one matrix.)
    """

    def init(params: Any) -> FactoredState:
        def zeros(which: int) -> Any:
            def one(param: jax.Array, names: tuple[str, ...]) -> jax.Array:
                dims = matrix_dims(names)[which]
                return jnp.zeros([1 if dim in dims else size for dim, size in enumerate(param.shape)], jnp.float32)

            return jax.tree.map(one, params, axes)

        return FactoredState(jnp.int32(0), zeros(1), zeros(0))

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        decay = 1 - (state.steps + 1.0) ** -0.8

        def mean(which: int, old: Any) -> Any:
            def one(grad: jax.Array, names: tuple[str, ...], old: jax.Array) -> jax.Array:
                squares = jnp.square(grad) + 1e-30
                return decay * old + (1 - decay) * squares.mean(matrix_dims(names)[which], keepdims=True)

            return jax.tree.map(one, grads, axes, old)

        def scaled(grad: jax.Array, names: tuple[str, ...], row: jax.Array, column: jax.Array) -> jax.Array:
            inputs, _ = matrix_dims(names)
            scaled = grad * jax.lax.rsqrt(row / row.mean(inputs, keepdims=True)) * jax.lax.rsqrt(column)
            own = tuple(dim for dim, name in enumerate(names) if name not in STACKED)
            rms = jnp.sqrt(jnp.square(scaled).mean(own, keepdims=True))
            return scaled / jnp.maximum(rms, 1.0)

        rows, columns = mean(1, state.rows), mean(0, state.columns)
        return jax.tree.map(scaled, grads, axes, rows, columns), FactoredState(state.steps + 1, rows, columns)

    return optax.GradientTransformation(init, update)
