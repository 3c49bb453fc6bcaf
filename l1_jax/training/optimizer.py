"""The optimizer of a config, and which parameters decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from l1_jax.training.matrices import is_matrix, map_axes, scale_by_factored_moment, scale_by_orthogonal_momentum
from l1_jax.training.section import TrainingConfig


def decays(path: tuple[Any, ...], _: jax.Array) -> bool:
    """Whether weight decay applies: to matrices and token embeddings, not to biases, norms and positions."""
    return path[-1].key in ("kernel", "token_embedding", "head")


def create_optimizer(config: TrainingConfig, axes: Any = None) -> optax.GradientTransformation:
    """Clipping, then the optimizer without its learning rate: the step multiplies by -rate(step), also after skipped
    updates. What has a rate of its own is multiplied by its ratio to `learning_rate` here.

    `axes`, from `transformer.build`, name the parameters' dimensions; AdamW and Lion do without.
    Sources: AdamW, Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; Lion, Chen et al. 2023, arXiv:2302.06675,
    algorithm 2; of the others in `matrices`.
    """
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else optax.identity()
    moment = jnp.dtype(config.moment_dtype)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=moment)
    decay = optax.add_decayed_weights(
        config.weight_decay, lambda params: jax.tree_util.tree_map_with_path(decays, params)
    )
    if config.optimizer == "muon":
        ratio = optax.scale(config.muon_learning_rate / config.learning_rate)
        groups = {
            "muon": optax.chain(scale_by_orthogonal_momentum(moment, axes), decay, ratio),
            "adamw": optax.chain(adam, decay),
        }
        labels = map_axes(lambda names: "muon" if is_matrix(names) else "adamw", axes)
        return optax.chain(clip, optax.partition(groups, labels))
    if config.optimizer == "adafactor":
        scale = scale_by_factored_moment(axes)
    else:
        scale = optax.scale_by_lion(config.beta1, config.beta2, moment) if config.optimizer == "lion" else adam
    return optax.chain(clip, scale, decay)
