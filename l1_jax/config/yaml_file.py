"""YAML and `section.key=value` overrides -> `Config`, with every mistake shown at once; and `Config` -> YAML."""

import contextlib
import functools
import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from ml_collections import ConfigDict

from l1_jax.config.schema import Config, contradictions
from l1_jax.errors import UserError, nearest
from l1_jax.storage.files import expand_user_path, read_text

ORIGINAL_KEYS = Path(__file__).with_name("original_keys.yaml")
SCHEMA = {name: {field.name: field for field in fields(section)} for name, section in vars(Config()).items()}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_WANT: dict[Any, str] = {bool: "true, false", int: "an integer", float: "a number", str: "a string", type(None): "null"}
_FOUND = {bool: "a boolean", int: "an integer", float: "a float", str: "a string"}
_MOST_BYTES, _MOST_DEPTH, _MOST_NODES = 1 << 17, 16, 1000
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+$|[0-9].*:)")  # YAML's octal (010 is 8) and base 60 (1:30 is 90)
_YAML = "tag:yaml.org,2002:"
_VALUE_TAGS = {_YAML + name for name in ("null", "bool", "int", "float", "str")}


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-4` is a number, and without what could make a small file costly: aliases, deep nesting, more
    values than any config has."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        limits = {
            "aliases (*name, <<: *name) are not read": self.check_event(yaml.AliasEvent),
            f"nested more than {_MOST_DEPTH} deep": self.depth > _MOST_DEPTH,
            f"more than {_MOST_NODES} names and values": self.nodes > _MOST_NODES,
        }
        for problem, broken in limits.items():
            if broken:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the strings that `_Loader` would read as numbers."""


_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver(_YAML + "float", _EXPONENT, list("-+.0123456789"))


_Dumper.add_implicit_resolver(_YAML + "float", _EXPONENT, list("-+.0123456789"))


# What other languages call null, and YAML reads as a string.
_LIKE_NULL = re.compile(r"none|nil|null|undefined", re.IGNORECASE)
_Dumper.add_implicit_resolver(_YAML + "null", re.compile(rf"(?:{_LIKE_NULL.pattern})$", re.IGNORECASE), list("nNuU"))


def load_config(path: Path | str, overrides: Sequence[str] = (), *, of_a_run: bool = False) -> Config:
    """Reads a YAML file and `section.key=value` overrides, which win; what both leave out has the schema's default.
    UserError where the file cannot be read, or it or an override has mistakes; `details` lists them if several. See
    `config_from_text` for `of_a_run`."""
    path = Path(path)
    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        hint = nearest(path.name, sorted(p.name for p in path.parent.glob("*.yaml") if p != path))
        raise UserError(f"cannot read {path}: {error.strerror}{hint}", "Give the path of a YAML file") from None
    return config_from_text(text, str(path), overrides, of_a_run=of_a_run)


def config_from_text(text: str, name: str, overrides: Sequence[str] = (), *, of_a_run: bool = False) -> Config:
    """The same as `load_config`, from a string; `name` is what messages call it: its path. A config that is
    `of_a_run` was read once, perhaps on another machine: what is only likely to be a slip is not looked for, and paths
    are not expanded."""
    reader = _Reader(of_a_run)
    reader.read_text(text, name)
    reader.read_overrides(overrides)
    merged = ConfigDict(asdict(Config()), type_safe=False).lock()  # the reader has checked the types
    merged.update_from_flattened_dict(reader.values)
    config = Config(**{section: type(default)(**merged[section]) for section, default in vars(Config()).items()})
    place = f"{name} with its overrides" if overrides else name
    mistakes = reader.mistakes
    for error in contradictions(config):
        if not any(key in str(error) for key in reader.mistaken):  # whose defaults they would be about
            mistakes.append(UserError(f"{place}: {error.what}", error.remedy))
    if len(mistakes) > 1:
        remedy = "Mend them as the lines above say"
        raise UserError(f"{place} has {len(mistakes)} mistakes", remedy, details=[str(e) for e in mistakes])
    if mistakes:
        raise mistakes[0]
    return config


def dump_config(config: Config) -> str:
    """YAML that reads back equal: every key, in the schema's order."""
    return yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Reader:
    """Reads values as `{"section.key": value}` and goes on after a mistake, so that all are found."""

    def __init__(self, of_a_run: bool) -> None:
        self._of_a_run = of_a_run
        self.values: dict[str, Any] = {}
        self.mistakes: list[UserError] = []
        self.mistaken: list[str] = []

    def read_text(self, text: str, file: str) -> None:
        try:
            root = _compose(text, file)
        except UserError as error:
            self.mistakes.append(error)
            return
        for where, section, body in self._entries(root, file, "the file"):
            if section in SCHEMA:
                for key_where, key, node in self._entries(body, file, f"section {section}", f"{section}."):
                    self._read_key(key_where, section, key, node)
            else:
                self._unknown(where, section)

    def read_overrides(self, overrides: Sequence[str]) -> None:
        for override in overrides:
            where = f"override {_short(override)}"
            name, equals, text = override.partition("=")
            section, dot, key = name.partition(".")
            if equals and dot:
                self._read_key(where, section, key, text)
            else:
                self._mistake(where, "this is not section.key=value", "Write it as in training.batch_size=4")

    def _mistake(self, where: str, what: str, remedy: str) -> None:
        self.mistakes.append(UserError(f"{where}: {what}", remedy))

    def _entries(self, node: yaml.Node, file: str, what: str, prefix: str = "") -> Iterator[tuple[str, str, yaml.Node]]:
        """The place, the name and the value of each line of a mapping; nothing where the node is null."""
        lines: dict[str, int] = {}
        if isinstance(node, yaml.MappingNode):
            for name_node, value in node.value:
                name, line = _text(name_node), name_node.start_mark.line + 1
                if first := lines.get(name):
                    self._mistake(f"{file}:{line}", f"{prefix}{name} is on line {first} already", "Keep one of the two")
                lines[name] = first or line
                yield f"{file}:{line}", name, value
        elif _value(node) is not None:
            where = f"{file}:{node.start_mark.line + 1}"
            self._mistake(where, f"{what} is {_found(node)}", "Write it as `name: value` lines")

    def _unknown(self, where: str, section: str, key: str = "") -> None:
        """A section that the schema has not, or a key that its section has not."""
        kind, word, name = ("key", key, f"{section}.{key}") if section in SCHEMA else ("section", section, section)
        if remedy := _original_keys().get(name):
            self._mistake(where, f"{kind} {name} is the original L1's, not known here", remedy)
            return
        homes = [f"{home}.{word}" for home, keys in SCHEMA.items() if word in keys]
        hint = f"; did you mean {homes[0]!r}?" if homes else nearest(word, list(SCHEMA.get(section, SCHEMA)))
        self._mistake(where, f"unknown {kind} {_short(name)}{hint}", "docs/configuration.md lists every key")

    def _read_key(self, where: str, section: str, key: str, given: yaml.Node | str) -> None:
        """Keeps the value of a node or, where `given` is a string, of an override."""
        field = SCHEMA.get(section, {}).get(key)
        if field is None:
            self._unknown(where, section, key)
            return
        kinds = _kinds(field.type)
        node = _override_node(given, kinds) if isinstance(given, str) else given
        value = _value(node)

        if {str, type(None)} <= set(kinds) and _is_like_null(node) and not self._of_a_run:
            self.mistaken.append(f"{section}.{key}")
            what = f"{section}.{key} is {_found(node)} and not null"
            self._mistake(where, what, "Write null, or where the string is meant put it in quotes in the YAML file")
            return

        if type(value) is int and int not in kinds:
            value = float(value)
        fits = type(value) in kinds or value in kinds
        if fits and type(value) in (int, float):
            fits = all(getattr(operator, name)(value, limit) for name, limit in field.metadata["limits"].items())
        if fits:
            self._keep(where, f"{section}.{key}", value, field.metadata["is_path"])
            return
        hint = nearest(value, [kind for kind in kinds if isinstance(kind, str)]) if isinstance(value, str) else ""
        self.mistaken.append(f"{section}.{key}")
        quoted = str in kinds and isinstance(node, yaml.ScalarNode) and value is not None
        remedy = f"Give {expected(field)}" + (f"; quotes make it a string: {_text(node)!r}" if quoted else "")
        self._mistake(where, f"{section}.{key} is {_found(node)}{hint}", remedy)

    def _keep(self, where: str, name: str, value: Any, is_path: bool) -> None:
        try:
            self.values[name] = expand_user_path(value, name) if is_path and not self._of_a_run else value
        except UserError as error:
            self.mistaken.append(name)
            self._mistake(where, error.what, error.remedy)


@functools.cache
def _original_keys() -> dict[str, str]:
    return yaml.safe_load(ORIGINAL_KEYS.read_text("utf-8"))


def _compose(text: str, name: str) -> yaml.Node:
    """The YAML's node tree; UserError where it is no YAML."""
    try:
        return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(_YAML + "null", "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{name}:{line}: {problem}", "Correct the YAML there") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: the control character U+{error.character:04X}", "Remove it") from None


def _override_node(text: str, kinds: list[Any]) -> yaml.Node:
    """An override's value: the bare text for a key that takes strings, else YAML."""
    if str not in kinds or text in ("", "~", "null", "Null", "NULL"):
        with contextlib.suppress(UserError):  # what is no YAML is a string, which this key does not take
            return _compose(text, "")
    return yaml.ScalarNode(_YAML + "str", text)


def _value(node: yaml.Node) -> Any:
    """The scalar as Python's value; the node itself where no key can take it (a list, a date, nan, inf, 2**63, and
    1:30 or 010, which are numbers in YAML alone)."""
    if isinstance(node, yaml.ScalarNode) and node.tag in _VALUE_TAGS:
        if node.tag in (_YAML + "int", _YAML + "float") and _ODD_NUMBER.match(node.value):
            return node
        with contextlib.suppress(ValueError, LookupError):  # `!!int x`; more digits than int() reads
            value = yaml.constructor.SafeConstructor().construct_object(node)
            if not isinstance(value, int | float) or abs(value) < 2**63:
                return value
    return node


def _is_like_null(node: yaml.Node) -> bool:
    """Whether null is likely meant: a string that other languages call so, without quotes."""
    is_plain = isinstance(node, yaml.ScalarNode) and node.tag == _YAML + "str" and not node.style
    return is_plain and _LIKE_NULL.fullmatch(node.value) is not None


def _kinds(hint: Any) -> list[Any]:
    """The alternatives of a key's type: `int | Literal["auto"]` -> [int, "auto"]."""
    return [kind for part in get_args(hint) for kind in _kinds(part)] or [hint]


def expected(field: Field[Any]) -> str:
    """What a key takes, in words: `an integer >= 1 or null`."""
    limits = " and".join(f" {_SIGNS[name]} {limit}" for name, limit in field.metadata["limits"].items())
    words = [_WANT.get(kind, kind) + (limits if kind in (int, float) else "") for kind in _kinds(field.type)]
    return " or ".join(", ".join(words).rsplit(", ", 1))


def _found(node: yaml.Node) -> str:
    """What stands there, and what YAML takes it for: `1.0, a float`."""
    value, text = _value(node), _text(node)
    if value is None or not isinstance(node, yaml.ScalarNode):
        return "null" if value is None else text
    return f"{repr(text) if isinstance(value, str) else text}, {_FOUND.get(type(value), 'which no key can take')}"


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _short(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _short(text: str) -> str:
    """One line of at most 60 characters."""
    line = repr(text)[1:-1] if not text.isprintable() else text
    return line if len(line) <= 60 else line[:57] + "..."
