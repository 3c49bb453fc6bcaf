"""YAML and `section.key=value` overrides -> `Config`, all mistakes at once; and back to YAML."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from ml_collections import ConfigDict

from l1_jax.config.key import When, alternatives, key_name, keys_of, section_of, to_plain, value_of
from l1_jax.config.schema import Config, contradictions
from l1_jax.config.values import (
    LIKE_NULL,
    YAML_TAG,
    UnfitError,
    expected,
    found,
    is_like_null,
    override_node,
    read_value,
    scalar_of,
    shorten,
    text_of,
)
from l1_jax.errors import UserError, nearest
from l1_jax.storage.files import expand_user_path, read_text

ORIGINAL_KEYS = Path(__file__).with_name("original_keys.yaml")

# The configs that come with the package: beside it in a checkout, in it where it is installed.
_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "configs", _PACKAGE.parent / "configs")

# Beside one of these a config was written by a run, not by a person.
RUN_FILES = ("run.json", "checkpoint.json")

_MOST_BYTES = 1 << 17
_MOST_DEPTH = 16
_MOST_NODES = 1000

Schema = TypeVar("Schema")


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-4` is a number, and without what could make a small file costly: aliases,
    deep nesting, more values than any config has."""

    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        limits = {
            "aliases (*name, <<: *name) are not read": self.check_event(yaml.AliasEvent),
            f"nested more than {_MOST_DEPTH} deep": self.depth > _MOST_DEPTH,
            f"more than {_MOST_NODES} names and values": self.nodes > _MOST_NODES,
        }

        for problem, broken in limits.items():
            if broken:
                mark = self.peek_event().start_mark
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)

        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the strings that `_Loader` would read as numbers."""


_EXPONENT = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver(YAML_TAG + "float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(YAML_TAG + "float", _EXPONENT, list("-+.0123456789"))
_Dumper.add_implicit_resolver(
    YAML_TAG + "null", re.compile(rf"(?:{LIKE_NULL.pattern})$", re.IGNORECASE), list("nNuU")
)


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, of_a_run: bool = False
) -> Config:
    """Reads a YAML file and `section.key=value` overrides, which win.

    What both leave out has the schema's default. A key of the file that has no effect beside the
    others is an error, unless a run wrote the file.

    Args:
        path: the file.
        overrides: as `training.max_steps=100`.
        of_a_run: the config was read once, perhaps on another machine: what is only likely to be a
            slip is not looked for, and paths are not expanded.

    Raises:
        UserError: the file cannot be read, or it or an override has mistakes; where there are
            several, `details` lists them.
    """
    if isinstance(overrides, str):
        overrides = [overrides]

    path = find_config(path)

    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        others = [other.name for other in path.parent.glob("*.yaml") if other != path]
        hint = nearest(path.name, sorted({*others, *shipped_configs()}))
        what = f"cannot read {path}: {error.strerror}{hint}"
        raise UserError(what, "Give the path of a YAML file") from None

    is_written = any((path.parent / name).is_file() for name in RUN_FILES)
    return config_from_text(
        text, str(path), overrides, of_a_run=of_a_run, written_by_run=is_written
    )


def find_config(name: Path | str) -> Path:
    """The file that a name means: a path that exists, else a config that comes with the package,
    as `tiny`; the path itself where there is neither."""
    path = Path(name)

    if path.exists() or len(path.parts) != 1:
        return path

    return shipped_configs().get(path.name.removesuffix(".yaml"), path)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by their names."""
    home = next((directory for directory in _SHIPPED if directory.is_dir()), None)
    return {path.stem: path for path in sorted(home.glob("*.yaml"))} if home else {}


def config_from_text(
    text: str,
    name: str,
    overrides: Sequence[str] = (),
    *,
    of_a_run: bool = False,
    written_by_run: bool = False,
) -> Config:
    """The same as `load_config`, from a string; `name` is what messages call it: its path."""
    reader = Reader(Config, of_a_run=of_a_run)
    reader.read_text(text, name)
    reader.read_overrides(overrides)

    config = reader.config()
    place = f"{name} with its overrides" if overrides else name
    mistakes = list(reader.mistakes)

    for error in contradictions(config):
        if not reader.is_about_mistaken(error):
            mistakes.append(UserError(f"{place}: {error.what}", error.remedy))

    if not of_a_run:
        mistakes += reader.unused_keys(config, written_by_run=written_by_run)

    if len(mistakes) > 1:
        details = [str(error) for error in sorted(mistakes, key=_line_of)]
        what = f"{place} has {len(mistakes)} mistakes"
        raise UserError(what, "Mend them: there is a line for each", details)

    if mistakes:
        raise mistakes[0]

    return config


def _line_of(error: UserError) -> float:
    """The line of the file that a mistake is in; those of overrides come after all."""
    match = re.match(r".*:(\d+): ", str(error))
    return int(match[1]) if match else math.inf


def dump_config(config: Any) -> str:
    """YAML that reads back equal: every key, in the schema's order."""
    return yaml.dump(to_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class Reader:
    """Reads a schema's values from YAML and overrides, and goes on after a mistake to find all.

    The schema is a frozen dataclass of sections, see `config.key`; or, `inside` a list of that
    name, one section.
    """

    def __init__(self, schema: Any, *, inside: str = "", of_a_run: bool = False):
        self.mistakes: list[UserError] = []
        self._schema = schema
        self._inside = inside
        self._of_a_run = of_a_run
        self._keys = dict(keys_of(schema))
        self._values: dict[str, Any] = {}
        self._opened: dict[str, bool] = {}  # sections that may be null: whether they are there
        self._places: dict[str, str] = {}  # where a key was written last
        self._mistaken: list[str] = []

    def read_text(self, text: str, file: str) -> None:
        try:
            root = _compose(text, file)
        except UserError as error:
            self.mistakes.append(error)
        else:
            self._read_section(root, self._schema, "", file)

    def read_overrides(self, overrides: Sequence[str]) -> None:
        for override in overrides:
            where = f"override {shorten(override)}"
            name, equals, text = override.partition("=")

            if (equals and "." in name) or (equals and self._find_section(name) is not None):
                self._read_override(where, name, text)
            else:
                what = "this is not section.key=value"
                self._mistake(where, what, "Write it as in training.batch_size=4")

    def config(self) -> Any:
        """The schema with what was read, and defaults for the rest."""
        defaults = _defaults(self._schema)

        for name, is_there in self._opened.items():
            _put(defaults, name, _defaults(self._find_section(name)) if is_there else None)

        merged = ConfigDict(defaults, type_safe=False).lock()  # the reader has checked the types
        merged.update_from_flattened_dict(self._values)
        return _build(self._schema, merged)

    def unused_keys(self, config: Any, *, written_by_run: bool) -> Iterator[UserError]:
        """An error for every key that was written, is not at its default, and has no effect beside
        the others. What a run wrote into its file is passed over, overrides are not."""
        for name, place in self._places.items():
            field = self._keys[name]
            used_with: tuple[When, ...] = field.metadata["used_with"]
            is_override = place.startswith("override ")

            if not used_with or (written_by_run and not is_override):
                continue

            if value_of(config, name) in (field.default, *field.metadata["neutral"]):
                continue

            if any(case.holds(config) for case in used_with):
                continue

            keys = [case.key for case in used_with]
            if any(key in self._mistaken for key in (name, *keys)):
                continue

            values = [value_of(config, key) for key in keys]
            shown = ["null" if value is None else value for value in values]
            others = " and ".join(f"{key}: {x}" for key, x in zip(keys, shown, strict=True))
            remedy = f"Remove it, or set {' or '.join(map(str, used_with))}"
            yield UserError(f"{place}: {name} has no effect with {others}", remedy)

    def is_about_mistaken(self, error: UserError) -> bool:
        """Whether an error is about a key whose value was not read: it would be about a default."""
        return any(name in str(error) for name in self._mistaken)

    def _mistake(self, where: str, what: str, remedy: str) -> None:
        self.mistakes.append(UserError(f"{where}: {what}", remedy))

    def _find_section(self, name: str) -> Any:
        """The section with a dotted name; None where there is none."""
        section = self._schema

        for part in name.split("."):
            fields = {key_name(field): field for field in dataclasses.fields(section)}
            section = section_of(fields[part].type) if part in fields else None

            if section is None:
                return None

        return section

    def _read_section(self, node: yaml.Node, section: Any, prefix: str, file: str) -> None:
        """The keys of a mapping, and the sections in it; `prefix` is `section.`, or empty."""
        what = f"section {prefix[:-1]}" if prefix else "the file"
        what = f"an item of {self._inside}" if self._inside else what
        fields = {key_name(field): field for field in dataclasses.fields(section)}

        for place, name, value in self._entries(node, file, what, prefix):
            field = fields.get(name)

            if field is None:
                self._unknown(place, prefix, name, fields)
            elif inner := section_of(field.type):
                self._open(prefix + name, value, field)
                self._read_section(value, inner, f"{prefix}{name}.", file)
            else:
                self._read_key(place, prefix + name, value)

    def _entries(
        self, node: yaml.Node, file: str, what: str, prefix: str
    ) -> Iterator[tuple[str, str, yaml.Node]]:
        """Place, name and value of each line of a mapping; nothing where the node is null."""
        lines: dict[str, int] = {}

        if isinstance(node, yaml.MappingNode):
            for name_node, value in node.value:
                name = text_of(name_node)
                line = name_node.start_mark.line + 1

                if first := lines.get(name):
                    twice = f"{prefix}{name} is on line {first} already"
                    self._mistake(f"{file}:{line}", twice, "Keep one of the two")

                lines[name] = first or line
                yield f"{file}:{line}", name, value
        elif scalar_of(node) is not None:
            where = f"{file}:{node.start_mark.line + 1}"
            self._mistake(where, f"{what} is {found(node)}", "Write it as `name: value` lines")

    def _open(self, name: str, node: yaml.Node, field: dataclasses.Field[Any]) -> None:
        """Notes of a section that may be null whether it is there."""
        if type(None) in alternatives(field.type):
            is_there = scalar_of(node) is not None
            self._opened[name] = is_there

            if not is_there:
                self._forget(f"{name}.")

    def _forget(self, prefix: str) -> None:
        """Drops what was read for the keys of a section that a later override closes."""
        for name in [name for name in self._values if name.startswith(prefix)]:
            del self._values[name], self._places[name]

    def _read_override(self, where: str, name: str, text: str) -> None:
        parts = name.split(".")

        # `lora.rank=8` opens the section lora.
        for end in range(1, len(parts)):
            parent = ".".join(parts[:end])
            if self._find_section(parent) is not None and self._is_optional(parent):
                self._opened[parent] = True

        if (section := self._find_section(name)) is not None:
            self._override_section(where, name, section, text)
        elif name in self._keys:
            kinds = alternatives(self._keys[name].type)
            self._read_key(where, name, override_node(text, kinds, _compose))
        else:
            prefix, _, key = name.rpartition(".")
            home = self._find_section(prefix)
            known = home and {key_name(field): field for field in dataclasses.fields(home)}
            if known:
                self._unknown(where, f"{prefix}.", key, known)
            else:
                top = {key_name(field): field for field in dataclasses.fields(self._schema)}
                self._unknown(where, "", parts[0], top)

    def _is_optional(self, name: str) -> bool:
        prefix, _, last = name.rpartition(".")
        home = self._find_section(prefix) if prefix else self._schema
        fields = {key_name(field): field for field in dataclasses.fields(home)}
        return type(None) in alternatives(fields[last].type)

    def _override_section(self, where: str, name: str, section: Any, text: str) -> None:
        """`lora=null` closes a section that may be null; nothing else is a value of a section."""
        if self._is_optional(name) and text in ("", "~", "null"):
            self._opened[name] = False
            self._forget(f"{name}.")
            return

        example = f"{name}.{key_name(dataclasses.fields(section)[0])}=..."
        self._mistake(where, f"{name} is a section", f"Override its keys, as in {example}")

    def _unknown(self, where: str, prefix: str, name: str, known: dict[str, Any]) -> None:
        """A name that its section has not."""
        dotted = f"{self._inside}.{name}" if self._inside else prefix + name
        kind = "key" if "." in dotted else "section"

        if remedy := _original_keys().get(dotted):
            what = f"{kind} {dotted} is the original L1's, not known here"
            self._mistake(where, what, remedy)
            return

        homes = [full for full in self._keys if full.rpartition(".")[2] == name]
        hint = f"; did you mean {homes[0]!r}?" if homes else nearest(name, list(known))
        what = f"unknown {kind} {shorten(dotted)}{hint}"
        self._mistake(where, what, "docs/configuration.md lists every key")

    def _read_key(self, where: str, name: str, node: yaml.Node) -> None:
        field = self._keys[name]
        takes_both = {str, type(None)} <= set(alternatives(field.type))

        if takes_both and is_like_null(node) and not self._of_a_run:
            self._mistaken.append(name)
            remedy = "Write null, or where the string is meant put it in quotes in the YAML file"
            self._mistake(where, f"{name} is {found(node)} and not null", remedy)
            return

        def read_section(item: yaml.Node, section: Any) -> Any:
            """An item of a list of sections, by a reader of its own."""
            reader = Reader(section, inside=name, of_a_run=self._of_a_run)
            file = where if where.startswith("override ") else where.rpartition(":")[0]
            reader._read_section(item, section, "", file)
            self.mistakes += reader.mistakes
            return reader.config()

        try:
            value = read_value(node, field.type, field.metadata["limits"], read_section)

            if field.metadata["is_path"] and value is not None and not self._of_a_run:
                value = expand_user_path(value, name)
        except UnfitError:
            self._mistaken.append(name)
            self._refuse(where, name, node, field)
        except UserError as error:
            self._mistaken.append(name)
            self._mistake(where, error.what, error.remedy)
        else:
            self._values[name] = value
            self._places[name] = where

    def _refuse(
        self, where: str, name: str, node: yaml.Node, field: dataclasses.Field[Any]
    ) -> None:
        kinds = alternatives(field.type)
        value = scalar_of(node)
        choices = [kind for kind in kinds if isinstance(kind, str)]
        hint = nearest(value, choices) if isinstance(value, str) else ""
        remedy = f"Give {expected(field)}"

        if str in kinds and isinstance(node, yaml.ScalarNode) and value is not None:
            remedy += f"; quotes make it a string: {text_of(node)!r}"

        self._mistake(where, f"{name} is {found(node)}{hint}", remedy)


def _defaults(section: Any) -> dict[str, Any]:
    """A section's keys with their defaults; of a section that may be null, null."""
    values = {}

    for field in dataclasses.fields(section):
        inner = section_of(field.type)
        is_there = inner is not None and field.default is not None
        values[key_name(field)] = _defaults(inner) if is_there else field.default

    return values


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Puts a value under a dotted name."""
    *parents, last = name.split(".")

    for parent in parents:
        values = values[parent]

    values[last] = value


def _build(section: Any, values: Any) -> Any:
    """A section from a `ConfigDict` of its keys."""
    arguments = {}

    for field in dataclasses.fields(section):
        value = values[key_name(field)]
        inner = section_of(field.type)
        is_section = inner is not None and value is not None
        arguments[field.name] = _build(inner, value) if is_section else value

    return section(**arguments)


@functools.cache
def _original_keys() -> dict[str, str]:
    return yaml.safe_load(ORIGINAL_KEYS.read_text("utf-8"))


def _compose(text: str, name: str) -> yaml.Node:
    """The YAML's node tree; UserError where it is no YAML."""
    try:
        return yaml.compose(text, Loader=_Loader) or yaml.ScalarNode(YAML_TAG + "null", "")
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{name}:{line}: {problem}", "Correct the YAML there") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"{name}:{line}: the control character U+{error.character:04X}"
        raise UserError(what, "Remove it") from None
