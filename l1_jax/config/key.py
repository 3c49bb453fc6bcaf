"""A key of the config knows all about itself.

Its type, default, limits and purpose, when it has an effect, and what a change at a resume means.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

MAX_STEPS = 2**31 - 1  # the counter of steps is an int32
MAX_BATCH = 2**22  # sequences of a step

# What a change of a key at a resume is: refused whatever a user allows, for the checkpoint has not
# the arrays that it needs; refused, for it would be another run; the same run with other numbers
# from here on; or the same numbers up to rounding.
Resume = Literal["never", "fatal", "warned", "free"]


class When(NamedTuple):
    """That another key has one of `values`; without values, that it is not `unlike`."""

    key: str
    values: tuple[Any, ...] = ()
    unlike: Any = None

    def holds(self, config: Any) -> bool:
        value = value_of(config, self.key)
        return value in self.values if self.values else value != self.unlike

    def __str__(self) -> str:
        """How to make it so, after the word "set"."""
        if self.values:
            return f"{self.key}: {' or '.join(map(str, self.values))}"

        return self.key if self.unlike is None else f"another {self.key}"


def when(name: str, *values: Any, unlike: Any = None) -> When:
    """See `When`."""
    return When(name, values, unlike)


class FrozenDict(Mapping[str, float]):
    """A map from text to number that a config can hold: it does not change, and has a hash."""

    def __init__(self, items: Mapping[str, float] | Iterable[tuple[str, float]] = ()):
        self._items = dict(items)

    def __getitem__(self, name: str) -> float:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def key(
    default: Any,
    doc: str,
    *,
    resume: Resume,
    used_with: When | tuple[When, ...] = (),
    neutral: tuple[Any, ...] = (),
    is_of_measure: bool = False,
    is_path: bool = False,
    **limits: float,
) -> Any:
    """Declares a key in a section, which is a frozen dataclass.

    The annotation is its type: `int`, `float`, `bool`, `str`, `None`, a `Literal`, or a union of
    them; `tuple[X, ...]` is a list of scalars, of pairs `tuple[str, float]`, or of sections; and
    `FrozenDict` a map from text to number. A name that Python reserves ends in `_`, in YAML not.

    Args:
        default: what the key is where nobody wrote it.
        doc: what it is for: the table in docs/configuration.md.
        resume: what a change at a resume is, see `Resume`.
        used_with: a key that has an effect only beside a certain value of another one, or of one
            of several, is refused where a user wrote it without that.
        neutral: values that ask for nothing there, beside the default: what a run wrote for it.
        is_of_measure: a validation loss is no match for one that was measured with another value.
        is_path: a leading `~` is expanded, see `files.expand_user_path`.
        limits: of its numbers: `ge`, `gt`, `le` and `lt`, named as in Python's `operator`.
    """
    metadata = {
        "doc": doc,
        "resume": resume,
        "used_with": (used_with,) if isinstance(used_with, When) else used_with,
        "neutral": neutral,
        "is_of_measure": is_of_measure,
        "is_path": is_path,
        "limits": limits,
    }
    return dataclasses.field(default=default, metadata=metadata)


def key_name(field: dataclasses.Field[Any]) -> str:
    """What a field is called in YAML."""
    return field.name.removesuffix("_")


def alternatives(hint: Any) -> list[Any]:
    """The types and values that a key takes: `int | Literal["auto"]` -> [int, "auto"]."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return [kind for part in get_args(hint) for kind in alternatives(part)]

    return [hint]


def section_of(hint: Any) -> Any:
    """The section that a field holds, optional or not; None where it holds something else."""
    return next((kind for kind in alternatives(hint) if dataclasses.is_dataclass(kind)), None)


def item_of(hint: Any) -> Any:
    """The type of a list's items; None where the hint is no list."""
    arguments = get_args(hint)
    is_list = get_origin(hint) is tuple and len(arguments) == 2 and arguments[1] is Ellipsis
    return arguments[0] if is_list else None


def keys_of(section: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Dotted name and field of every key of a section and of the sections in it, in order."""
    for field in dataclasses.fields(section):
        name = prefix + key_name(field)

        if inner := section_of(field.type):
            yield from keys_of(inner, f"{name}.")
        else:
            yield name, field


def values_of(config: Any, section: Any = None, prefix: str = "") -> dict[str, Any]:
    """The value of every key by its dotted name; null for those of a section that is not there."""
    values: dict[str, Any] = {}

    for field in dataclasses.fields(config if section is None else section):
        name = prefix + key_name(field)
        value = None if config is None else getattr(config, field.name)

        if inner := section_of(field.type):
            values |= values_of(value, inner, f"{name}.")
        else:
            values[name] = value

    return values


def value_of(config: Any, name: str) -> Any:
    """The value of the key with a dotted name; null where its section is not there."""
    return values_of(config, type(config))[name]


def to_text(value: Any) -> str:
    """A value as YAML spells it, on one line; a text without quotes."""
    return value if isinstance(value, str) else json.dumps(to_plain(value))


def to_plain(value: Any) -> Any:
    """A config, section or value as what YAML and JSON have: dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {key_name(field): to_plain(getattr(value, field.name)) for field in fields}

    if isinstance(value, FrozenDict):
        return dict(value)

    return [to_plain(item) for item in value] if isinstance(value, tuple) else value
