"""The optimizer of a config, and which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from l1_jax.training.matrices import (
    is_matrix,
    map_axes,
    scale_by_factored_moment,
    scale_by_orthogonal_momentum,
)
from l1_jax.training.section import TrainingConfig


def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
    """Whether weight decay applies: to matrices and token embeddings.

    It does not apply to biases, norms and positions.
    """
    return path[-1].key in ("kernel", "token_embedding", "head")


def create_optimizer(config: TrainingConfig, axes: Any = None) -> optax.GradientTransformation:
    """Clipping, then the optimizer without its learning rate.

    The step multiplies by -rate(step), also after skipped updates. What has a rate of its own is
    multiplied by its ratio to `learning_rate` here.

    Args:
        config: the section of the run's config.
        axes: from `transformer.build`, the names of the parameters' dimensions; AdamW and Lion do
            without.

    Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Lion, Chen et al. 2023,
    arXiv:2302.06675, algorithm 2; of the others in `matrices`.
    """
    clip = optax.identity()
    if config.max_grad_norm:
        clip = optax.clip_by_global_norm(config.max_grad_norm)

    decay = optax.add_decayed_weights(config.weight_decay, mask=_decay_mask)

    if config.optimizer == "muon":
        return optax.chain(clip, _muon_and_adam(config, axes, decay))
    if config.optimizer == "adafactor":
        return optax.chain(clip, scale_by_factored_moment(axes), decay)
    if config.optimizer == "lion":
        moment = jnp.dtype(config.moment_dtype)
        lion = optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=moment)
        return optax.chain(clip, lion, decay)
    return optax.chain(clip, _adam(config), decay)


def _adam(config: TrainingConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        b1=config.beta1, b2=config.beta2, eps=config.eps, mu_dtype=jnp.dtype(config.moment_dtype)
    )


def _muon_and_adam(
    config: TrainingConfig, axes: Any, decay: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    moment = jnp.dtype(config.moment_dtype)
    momentum = scale_by_orthogonal_momentum(moment, axes)
    # The step multiplies all updates by the rate of AdamW's.
    ratio = optax.scale(config.muon_learning_rate / config.learning_rate)
    groups = {
        "muon": optax.chain(momentum, decay, ratio),
        "adamw": optax.chain(_adam(config), decay),
    }

    def group(names: tuple[str, ...]) -> str:
        return "muon" if is_matrix(names) else "adamw"

    return optax.partition(groups, map_axes(group, axes))


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(decays, params)
