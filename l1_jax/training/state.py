"""What a run carries from step to step: its kinds of arrays, its placement, its place on the shelf.

Three words for arrays:

- *trained*: moments, saved. They are in `TrainState.params`.
- *held*: the model's own, but frozen; saved, without moments or gradients. In `TrainState.held`.
- *borrowed*: of another checkpoint (a teacher, a reference). Not in the state, and not saved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from optax import GradientTransformation

from l1_jax.model.stack import inner_prefix, join_stack, split_like
from l1_jax.parallel.sharding import named
from l1_jax.training.average import AVERAGE, begin_average
from l1_jax.training.health import Health, LossScale, initial_health, initial_loss_scale

Tree = dict[str, Any]  # nested dicts of arrays, or of what stands for them
Initialiser = Callable[[jax.Array], Tree]
Predicate = Callable[[str], bool]  # on a parameter's dotted path, as blocks.3.mlp.up.kernel

# The items of a checkpoint that every run has; each tree beside the state is one more.
PARAMS = "params"
OPTIMIZER = "optimizer"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and writes."""

    step: jax.Array  # int32 scalar: batches consumed
    params: Tree  # the trained parameters
    opt_state: Any
    loss_scale: LossScale | None  # with float16 only
    health: Health
    held: Tree = dataclasses.field(default_factory=dict)
    beside: dict[str, Tree] = dataclasses.field(default_factory=dict)  # named trees, each an item

    @property
    def weights(self) -> Tree:
        """All parameters of the model, trained and held."""
        return merge(self.params, self.held)

    @property
    def evaluated(self) -> Tree:
        """The parameters that are validated: averages where the run keeps them."""
        return merge(self.beside.get(AVERAGE, self.params), self.held)


def everything(_: str) -> bool:
    """The predicate of a run that trains all of its parameters."""
    return True


def partition(tree: Tree, is_trained: Predicate, prefix: str = "") -> tuple[Tree, Tree]:
    """The trained and the held part of a tree; an empty dict is left out.

    Of a group of layers the number of the first is in the paths that the predicate gets: in a group
    all are treated alike.
    """
    trained: Tree = {}
    held: Tree = {}

    for name, value in tree.items():
        path = prefix + name

        if isinstance(value, dict):
            inner = partition(value, is_trained, prefix=inner_prefix(path, value))
            parts = zip((trained, held), inner, strict=True)
            for part, values in parts:
                if values:
                    part[name] = values
        elif is_trained(path):
            trained[name] = value
        else:
            held[name] = value

    return trained, held


def merge(first: Tree, second: Tree) -> Tree:
    """Two parts of a tree as one again, see `partition`; the names in order, as jax has them."""
    if not second:
        return first

    merged = dict(first)

    for name, value in second.items():
        merged[name] = merge(merged[name], value) if name in merged else value

    return merged


def to_trees(state: TrainState) -> dict[str, Any]:
    """A state as the items of a checkpoint.

    The parameters and their average are those of all layers, held or not, so that each is a whole
    model, with which a run that trains others can begin. The moments are of the trained alone.
    """
    progress = {
        "step": state.step,
        "opt_state": state.opt_state,
        "loss_scale": state.loss_scale,
        "health": state.health,
    }
    trees = {PARAMS: join_stack(state.weights), OPTIMIZER: progress, **state.beside}
    if AVERAGE in state.beside:
        trees[AVERAGE] = join_stack(state.evaluated)
    return trees


def from_trees(trees: dict[str, Any], like: TrainState) -> TrainState:
    """The state whose `to_trees` these are; `like` says which parameters are held."""
    weights = split_like(trees[PARAMS], like.weights)
    beside = {name: trees[name] for name in like.beside}
    if AVERAGE in beside:
        average = split_like(beside[AVERAGE], like.weights)
        beside[AVERAGE] = select(average, like.params)

    return TrainState(
        params=select(weights, like.params),
        held=select(weights, like.held),
        beside=beside,
        **trees[OPTIMIZER],
    )


def select(tree: Tree, like: Tree) -> Tree:
    """The part of a tree that has the names of `like`."""
    return {
        name: select(tree[name], value) if isinstance(value, dict) else tree[name]
        for name, value in like.items()
    }


def training_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of randomness: 0 initial weights, 1 dropout."""
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), stream)


def create_state(
    initialise: Initialiser,
    optimizer: GradientTransformation,
    weights: Tree | None = None,
    *,
    seed: int,
    is_float16: bool,
    has_average: bool = False,
    is_trained: Predicate = everything,
) -> TrainState:
    """The state of step 0.

    Args:
        initialise: draws all parameters of the model.
        optimizer: of those that are trained.
        weights: with which the run begins, in place of drawn ones.
        seed: of the draws.
        is_float16: there is a loss scale.
        has_average: the weights are averaged over the steps.
        is_trained: which parameters are, by their paths.
    """
    if weights is None:
        weights = initialise(training_key(seed, 0))

    params, held = partition(weights, is_trained)
    loss_scale = initial_loss_scale() if is_float16 else None
    health = initial_health()

    return TrainState(
        step=jnp.int32(0),
        params=params,
        held=held,
        opt_state=optimizer.init(params),
        loss_scale=loss_scale,
        health=health,
        beside=begin_average(params) if has_average else {},
    )


def place_state(shapes: TrainState, axes: Tree, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's shapes with shardings.

    An array of the optimizer, or of a tree beside the state, lies as the parameter that it belongs
    to, dimension by dimension; those that it has averaged over, of size 1, are whole. What belongs
    to no parameter is whole.

    Args:
        shapes: `jax.eval_shape` of `create_state`.
        axes: the names of all parameters' dimensions, from `transformer.build`.
        mesh: an abstract one is enough.
    """
    paths = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    names_of = dict(paths)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """The path of an array ends with that of its parameter."""
        tails = (path[start:] for start in range(len(path)))
        names = next((names_of[tail] for tail in tails if tail in names_of), ())
        divided: list[str | None] = list(names)

        if names and path[0].name not in ("params", "held"):
            sizes = zip(names, leaf.shape, strict=True)
            divided = [name if size > 1 else None for name, size in sizes]

        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(mesh, *divided))

    return jax.tree_util.tree_map_with_path(place, shapes)
