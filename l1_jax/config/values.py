"""YAML nodes as values of keys, and in words what a key takes and what stands there instead."""

import contextlib
import operator
import re
from collections.abc import Callable
from dataclasses import Field
from typing import Any, get_args

import yaml

from l1_jax.config.key import FrozenDict, alternatives, item_of, section_of
from l1_jax.errors import UserError

YAML_TAG = "tag:yaml.org,2002:"

_VALUE_TAGS = {YAML_TAG + name for name in ("null", "bool", "int", "float", "str")}
_NUMBER_TAGS = (YAML_TAG + "int", YAML_TAG + "float")
_ODD_NUMBER = re.compile(
    r"[-+]?(0[0-9_]+$|[0-9].*:)"
)  # YAML's octal (010 is 8), base 60 (1:30 is 90)

# What other languages call null, and YAML reads as a string.
LIKE_NULL = re.compile(r"none|nil|null|undefined", re.IGNORECASE)

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_FOUND = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}
_WANTED: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
    FrozenDict: "a map of names to numbers",
}
_WANTED_ITEMS = {
    str: "strings",
    int: "integers",
    float: "numbers",
    tuple[str, float]: "[name, number] pairs",
}


class UnfitError(Exception):
    """A node is nothing that its key takes."""


def scalar_of(node: yaml.Node) -> Any:
    """The scalar as Python's value; the node itself where no key can take it: a list, a date, nan,
    inf, 2**63, and 1:30 or 010, which are numbers in YAML alone."""
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _VALUE_TAGS:
        return node

    if node.tag in _NUMBER_TAGS and _ODD_NUMBER.match(node.value):
        return node

    with contextlib.suppress(ValueError, LookupError):  # `!!int x`; more digits than int() reads
        value = yaml.constructor.SafeConstructor().construct_object(node)

        if not isinstance(value, int | float) or abs(value) < 2**63:
            return value

    return node


def is_like_null(node: yaml.Node) -> bool:
    """Whether null is likely meant: a string that other languages call so, without quotes."""
    if not isinstance(node, yaml.ScalarNode) or node.tag != YAML_TAG + "str" or node.style:
        return False

    return LIKE_NULL.fullmatch(node.value) is not None


def read_value(
    node: yaml.Node,
    hint: Any,
    limits: dict[str, float],
    read_section: Callable[[yaml.Node, Any], Any],
) -> Any:
    """The value of a node for a key of type `hint`, whose numbers keep the `limits`.

    A list's items that are sections go to `read_section(node, section)`. Raises `UnfitError`.
    """
    for kind in alternatives(hint):
        if isinstance(node, yaml.SequenceNode) and item_of(kind):
            return tuple(
                _read_item(item, item_of(kind), limits, read_section) for item in node.value
            )

        if isinstance(node, yaml.MappingNode) and kind is FrozenDict:
            pairs = [(_read_name(name), value) for name, value in node.value]
            return FrozenDict({name: _read_scalar(value, float, limits) for name, value in pairs})

    return _read_scalar(node, hint, limits)


def _read_item(
    node: yaml.Node,
    hint: Any,
    limits: dict[str, float],
    read_section: Callable[[yaml.Node, Any], Any],
) -> Any:
    if section := section_of(hint):
        return read_section(node, section)

    kinds = get_args(hint)  # of a pair, else ()

    if not kinds:
        return _read_scalar(node, hint, limits)

    if not isinstance(node, yaml.SequenceNode) or len(node.value) != len(kinds):
        raise UnfitError

    return tuple(
        _read_scalar(part, kind, limits) for part, kind in zip(node.value, kinds, strict=True)
    )


def _read_name(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise UnfitError

    return node.value


def _read_scalar(node: yaml.Node, hint: Any, limits: dict[str, float]) -> Any:
    kinds = alternatives(hint)
    value = scalar_of(node)

    if type(value) is int and int not in kinds:
        value = float(value)

    if isinstance(value, yaml.Node) or not (type(value) in kinds or value in kinds):
        raise UnfitError

    if type(value) in (int, float):
        for name, limit in limits.items():
            if not getattr(operator, name)(value, limit):
                raise UnfitError

    return value


def expected(field: Field[Any]) -> str:
    """What a key takes, in words: `an integer >= 1 or null`."""
    limits = field.metadata["limits"]
    bounds = " and".join(f" {_SIGNS[name]} {limit}" for name, limit in limits.items())
    words = []

    for kind in alternatives(field.type):
        if kind is bool:
            words += ["true", "false"]
        elif item := item_of(kind):
            section = section_of(item)
            words.append(f"a list of {'mappings' if section else _WANTED_ITEMS[item]}{bounds}")
        elif kind in (int, float, FrozenDict):
            words.append(_WANTED[kind] + bounds)
        else:
            words.append(_WANTED.get(kind, kind))

    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def found(node: yaml.Node) -> str:
    """What stands there, and what YAML takes it for: `1.0, a float`."""
    value = scalar_of(node)
    text = text_of(node)

    if value is None:
        return "null"

    if not isinstance(node, yaml.ScalarNode):
        return text

    quoted = repr(text) if isinstance(value, str) else text
    return f"{quoted}, {_FOUND.get(type(value), 'which no key can take')}"


def text_of(node: yaml.Node) -> str:
    """A node as it is called in a message."""
    if isinstance(node, yaml.ScalarNode):
        return shorten(node.value)

    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def shorten(text: str) -> str:
    """One line of at most 60 characters."""
    line = repr(text)[1:-1] if not text.isprintable() else text
    return line if len(line) <= 60 else line[:57] + "..."


def override_node(
    text: str, kinds: list[Any], compose: Callable[[str, str], yaml.Node]
) -> yaml.Node:
    """An override's value: the bare text for a key that takes strings, else YAML."""
    if str not in kinds or text in ("", "~", "null", "Null", "NULL"):
        with contextlib.suppress(UserError):  # what is no YAML is a string, which this key refuses
            return compose(text, "")

    return yaml.ScalarNode(YAML_TAG + "str", text)
