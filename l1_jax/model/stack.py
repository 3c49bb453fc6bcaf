"""The stack of layers as groups: consecutive layers of one treatment, their arrays stacked.

With one group `params["blocks"]` is that of all layers; with several it has a part for each, as
`blocks.0-1` of layers 0 and 1. A checkpoint always has all layers stacked.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

BLOCKS = "blocks"

Tree = dict[str, Any]


class Group(NamedTuple):
    """Layers `first` to `end - 1`."""

    first: int
    end: int

    @property
    def name(self) -> str:
        """As `0-1`."""
        return f"{self.first}-{self.end - 1}"


def whole_stack(num_layers: int) -> tuple[Group, ...]:
    """One group of all layers."""
    return (Group(0, num_layers),)


def group_layers(
    num_layers: int, names: Sequence[str], treatment: Callable[[str], Any]
) -> tuple[Group, ...]:
    """The fewest groups in each of which all layers are treated alike.

    Args:
        num_layers: of the stack.
        names: dotted paths of a layer's parameters, as `mlp.up.kernel`.
        treatment: of a parameter, by its path with the layer's number: `blocks.3.mlp.up.kernel`.
    """

    def of_layer(number: int) -> list[Any]:
        return [treatment(f"{BLOCKS}.{number}.{name}") for name in names]

    treatments = [of_layer(number) for number in range(num_layers)]
    changes = [n for n in range(1, num_layers) if treatments[n] != treatments[n - 1]]
    bounds = [0, *changes, num_layers]
    return tuple(Group(first, end) for first, end in itertools.pairwise(bounds))


def groups_of(blocks: Tree) -> tuple[Group, ...] | None:
    """The groups that a tree of blocks has a part for, in order; None of one that is whole."""
    matches = [re.fullmatch(r"(\d+)-(\d+)", name) for name in blocks]
    if not all(matches) or not matches:
        return None

    found = [Group(int(match[1]), int(match[2]) + 1) for match in matches if match]
    return tuple(sorted(found))


def split_stack(params: Tree, groups: Sequence[Group]) -> Tree:
    """Parameters with their blocks in groups.

    Args:
        params: with stacked blocks: arrays, or what stands for them.
        groups: one or more.
    """
    if len(groups) == 1:
        return params

    def part(group: Group) -> Any:
        return jax.tree.map(lambda leaf: _cut(leaf, group), params[BLOCKS], is_leaf=_is_names)

    return params | {BLOCKS: {group.name: part(group) for group in groups}}


def join_stack(params: Tree) -> Tree:
    """Parameters with their blocks stacked again; see `split_stack`."""
    groups = groups_of(params.get(BLOCKS, {}))
    if groups is None:
        return params

    parts = [params[BLOCKS][group.name] for group in groups]
    return params | {BLOCKS: jax.tree.map(lambda *leaves: _join(leaves), *parts)}


def split_like(params: Tree, like: Tree) -> Tree:
    """Parameters with their blocks in the groups of another tree."""
    groups = groups_of(like.get(BLOCKS, {}))
    return params if groups is None else split_stack(params, groups)


def inner_prefix(path: str, inner: Tree) -> str:
    """The beginning of the numbered paths inside a tree that lies at `path`.

    Args:
        path: of the tree, as `mlp`, `blocks`, or `blocks.` and a group's name.
        inner: the tree.
    """
    if path == BLOCKS:
        return f"{BLOCKS}." if groups_of(inner) else f"{BLOCKS}.0."

    of_group = re.fullmatch(rf"{BLOCKS}\.(\d+)-\d+", path)
    return f"{BLOCKS}.{of_group[1]}." if of_group else f"{path}."


def layer_paths(params: Tree) -> list[str]:
    """Dotted paths of a layer's parameters, as `mlp.up.kernel`; its blocks are one group."""
    leaves = jax.tree_util.tree_leaves_with_path(params[BLOCKS], is_leaf=_is_names)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def _is_names(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _cut(leaf: Any, group: Group) -> Any:
    if _is_names(leaf):
        return leaf

    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(shape=(group.end - group.first, *leaf.shape[1:]))

    return leaf[group.first : group.end]


def _join(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return first.update(shape=(sum(leaf.shape[0] for leaf in leaves), *first.shape[1:]))

    return jnp.concatenate(leaves)
