"""YAML and `section.key=value` overrides -> `Config`, with every mistake shown at once; and `Config` -> YAML."""

import contextlib
import dataclasses
import json
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from ml_collections import ConfigDict

from l1_jax.config import Config, contradictions
from l1_jax.errors import UserError, nearest

_SCHEMA: dict[str, dict[str, dataclasses.Field[Any]]] = {
    name: {field.name: field for field in dataclasses.fields(section)} for name, section in vars(Config()).items()
}
_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "minimum": (">=", operator.ge),
    "above": (">", operator.gt),
    "below": ("<", operator.lt),
    "maximum": ("<=", operator.le),
}
_NAMES: dict[Any, tuple[str, ...]] = {
    bool: ("true", "false"),
    int: ("an integer",),
    float: ("a number",),
    str: ("a string",),
    type(None): ("null",),
}
_YAML = "tag:yaml.org,2002:"
_VALUE_TAGS = {_YAML + name for name in ("null", "bool", "int", "float", "str")}

# What to do with a key that the original L1 (PyTorch) has and this schema has not.
_L1_KEYS: dict[str, str] = {
    key: remedy
    for keys, remedy in (
        ("model.use_cache", "Remove it: generation always uses the cache"),
        ("model.pad_token_id model.eos_token_id model.bos_token_id", "Remove it: it comes from the tokenizer"),
        ("training.eval_batch_size", "Remove it: validation uses training.batch_size"),
        ("training.optimizer_type", "Remove it: the optimizer is AdamW"),
        ("training.scheduler_type training.lr_scheduler", "Remove it: the schedule is linear warm-up, then cosine"),
        ("training.warmup_ratio", "Use training.warmup_steps: a number of steps, or auto"),
        ("training.max_seq_length data.max_length", "Use model.max_seq_length"),
        ("training.dataloader_num_workers", "Remove it: a batch is computed from its step, not loaded by workers"),
        ("training.dataloader_pin_memory", "Remove it: JAX moves the batches to the device"),
        ("training.load_best_model_at_end", "Remove it: best_model is always kept, and --model RUN_DIR means it"),
        ("training.eval_strategy", "Use training.eval_steps: validation runs every so many steps"),
        ("training.metric_for_best_model training.greater_is_better", "Remove it: the lowest validation loss is best"),
        ("training.report_to", "Remove it: TensorBoard is always written, and training.wandb_project turns W&B on"),
        ("training.checkpoint_every_steps", "Use training.save_steps"),
        ("training.max_checkpoints_to_keep", "Use training.save_total_limit"),
        ("training.mixed_precision", "Use training.precision"),
        ("data.train_data_path data.val_data_path data.test_data_path", "Use data.path: prepare_data.py's --output"),
        ("data.val_split data.test_split", "Use --train-ratio and --val-ratio of scripts/prepare_data.py"),
        ("data.tokenizer_type data.tokenizer_path", "Use --tokenizer of scripts/prepare_data.py"),
        ("data.vocab_size", "Use model.vocab_size, and --vocab-size of scripts/prepare_data.py"),
        ("data.stride", "Remove it: the text is cut into sequences without overlap"),
        ("generation.max_new_tokens", "Use --max-tokens of scripts/generate.py"),
        ("generation.do_sample", "Remove it: generation.temperature 0 is greedy, above 0 it samples"),
        ("performance", "Remove it: every run is compiled; training.gradient_checkpointing is the rest"),
    )
    for key in keys.split()
}


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-4` is a number, and without aliases, which could make a small file huge."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name, <<: *name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around the strings that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        _YAML + "float",
        re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"),
        list("-+.0123456789"),
    )


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file; what it leaves out has the schema's default.

    Args:
        path: the file.
        overrides: `section.key=value` arguments; they win over the file, a later one over an earlier.

    Returns:
        The checked config.

    Raises:
        UserError: the file cannot be read, or it or an override has mistakes; `details` lists them if several.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        hint = nearest(path.name, sorted(p.name for p in path.parent.glob("*.yaml"))) if missing else ""
        raise UserError(f"cannot read {path}: {error.strerror}{hint}", "Give the path of a YAML file") from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})"
        raise UserError(what, "Save the file as UTF-8") from None
    return config_from_text(text, str(path), overrides)


def config_from_text(text: str, name: str, overrides: Sequence[str] = ()) -> Config:
    """The same as `load_config`, from a string; overrides, result and errors are as there.

    Args:
        text: the YAML.
        name: what to call it in messages: its path.
        overrides: `section.key=value` arguments.
    """
    reader = _Reader()
    reader.read_text(text, name)
    reader.read_overrides(overrides)
    merged = ConfigDict(Config().to_dict(), type_safe=False).lock()  # the reader has checked the types
    merged.update_from_flattened_dict(reader.values)
    config = Config(**{section: type(default)(**merged[section]) for section, default in vars(Config()).items()})
    place = f"{name} with its overrides" if overrides else name
    mistakes = reader.mistakes or [UserError(f"{place}: {e.what}", e.remedy) for e in contradictions(config)]
    if len(mistakes) > 1:
        raise UserError(
            f"{place} has {len(mistakes)} mistakes",
            "Mend them as the lines above say; the keys that they do not name are right",
            details=[str(mistake) for mistake in mistakes],
        )
    if mistakes:
        raise mistakes[0]
    return config


def dump_config(config: Config) -> str:
    """YAML that reads back equal: every key, in the schema's order."""
    return yaml.dump(config.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def describe_keys() -> str:
    """The schema as a Markdown table, for docs/configuration.md."""
    rows = ["| section | key | type | default | what it is for |", "|---|---|---|---|---|"]
    for section, fields in _SCHEMA.items():
        for field in fields.values():
            default = json.dumps(field.default)
            rows.append(f"| {section} | `{field.name}` | {_expected(field)} | `{default}` | {field.metadata['doc']} |")
    return "\n".join(rows) + "\n"


class _Reader:
    """Reads values as `{"section.key": value}` and goes on after a mistake, so that all are found."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.mistakes: list[UserError] = []

    def read_text(self, text: str, name: str) -> None:
        lines: dict[str, int] = {}

        def pairs(node: yaml.Node, prefix: str, what: str) -> Iterator[tuple[str, str, yaml.Node]]:
            if not isinstance(node, yaml.MappingNode):
                if _value(node) is not None:
                    where = f"{name}:{node.start_mark.line + 1}"
                    self._mistake(where, f"{what} is {_found(node)}", "Write it as `name: value` lines")
                return
            for key_node, body in node.value:
                key, line = _text(key_node), key_node.start_mark.line + 1
                if prefix + key in lines:
                    what = f"{prefix}{key} is on line {lines[prefix + key]} already"
                    self._mistake(f"{name}:{line}", what, "Keep one of the two")
                lines.setdefault(prefix + key, line)
                yield f"{name}:{line}", key, body

        try:
            root = _compose(text, name)
        except UserError as error:
            self.mistakes.append(error)
            return
        for where, section, body in pairs(root, "", "the file"):
            if section not in _SCHEMA:
                self._unknown(where, section)
                continue
            for key_where, key, node in pairs(body, f"{section}.", f"section {section}"):
                if field := _SCHEMA[section].get(key):
                    self._read_value(key_where, section, field, node)
                else:
                    self._unknown(key_where, section, key)

    def read_overrides(self, overrides: Sequence[str]) -> None:
        for override in overrides:
            where = f"override {_short(override)}"
            name, equals, text = override.partition("=")
            section, dot, key = name.partition(".")
            if not (equals and dot):
                self._mistake(where, "this is not section.key=value", "Write it as in training.batch_size=4")
            elif section not in _SCHEMA:
                self._unknown(where, section)
            elif field := _SCHEMA[section].get(key):
                self._read_value(where, section, field, _override_node(text, field))
            else:
                self._unknown(where, section, key)

    def _mistake(self, where: str, what: str, remedy: str) -> None:
        self.mistakes.append(UserError(f"{where}: {what}", remedy))

    def _unknown(self, where: str, section: str, key: str | None = None) -> None:
        """A section that the schema has not, or a key that its section has not."""
        kind, word = ("section", section) if key is None else ("key", key)
        name = _short(section if key is None else f"{section}.{key}")
        if name in _L1_KEYS:
            self._mistake(where, f"{kind} {name} is the original L1's, not known here", _L1_KEYS[name])
            return
        homes = [f"{home}.{word}" for home, fields in _SCHEMA.items() if word in fields]
        hint = f"; did you mean {homes[0]!r}?" if homes else nearest(word, list(_SCHEMA.get(section, _SCHEMA)))
        self._mistake(where, f"unknown {kind} {name}{hint}", "docs/configuration.md lists every key")

    def _read_value(self, where: str, section: str, field: dataclasses.Field[Any], node: yaml.Node) -> None:
        kinds, value = _kinds(field), _value(node)
        if _accepts(field, value):
            value = float(value) if type(value) is int and int not in kinds else value
            self.values[f"{section}.{field.name}"] = value
            return
        quoted = isinstance(node, yaml.ScalarNode) and value is not None and str in kinds
        remedy = f"Give {_expected(field)}" + (f"; quotes make it a string: {_text(node)!r}" if quoted else "")
        hint = nearest(value, _choices(field)) if isinstance(value, str) else ""
        self._mistake(where, f"{section}.{field.name} is {_found(node)}{hint}", remedy)


def _compose(text: str, name: str) -> yaml.Node:
    """The YAML's node tree; UserError where it is no YAML."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(f"{name}:{line}: {problem}", "Correct the YAML there") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"{name}:{line}: the control character U+{error.character:04X}", "Remove it") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply", "Give sections with keys, nothing deeper") from None
    return node or yaml.ScalarNode(_YAML + "null", "")


def _override_node(text: str, field: dataclasses.Field[Any]) -> yaml.Node:
    """An override's value: the bare text for a key that takes strings, else YAML."""
    if str not in _kinds(field) or text in ("", "~", "null", "Null", "NULL"):
        with contextlib.suppress(UserError):  # what is no YAML is a string, which this key does not take
            return _compose(text, "")
    return yaml.ScalarNode(_YAML + "str", text)


def _value(node: yaml.Node) -> Any:
    """The scalar as Python's value; the node itself where no key can take it (a list, a date, nan, inf, 2**63)."""
    if isinstance(node, yaml.ScalarNode) and node.tag in _VALUE_TAGS:
        with contextlib.suppress(ValueError, LookupError):  # `!!int x`; more digits than int() reads
            value = yaml.constructor.SafeConstructor().construct_object(node)
            if not isinstance(value, int | float) or abs(value) < 2**63:
                return value
    return node


def _kinds(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """The alternatives of a key's type: `int | None` -> (int, NoneType)."""
    plain = isinstance(field.type, type) or get_origin(field.type) is Literal
    return (field.type,) if plain else get_args(field.type)


def _choices(field: dataclasses.Field[Any]) -> list[str]:
    return [choice for kind in _kinds(field) if get_origin(kind) is Literal for choice in get_args(kind)]


def _accepts(field: dataclasses.Field[Any], value: Any) -> bool:
    """Whether type and limits hold; a bool is no integer, an integer is fine for a float."""
    kind, kinds = type(value), _kinds(field)
    if kind in (int, float):
        limits = [(holds, field.metadata[name]) for name, (_, holds) in _LIMITS.items() if name in field.metadata]
        fits = kind in kinds or float in kinds
        return fits and all(holds(value, limit) for holds, limit in limits)
    return kind in kinds or value in _choices(field)


def _expected(field: dataclasses.Field[Any]) -> str:
    """What a key takes, in words: `an integer >= 1 or null`."""
    limits = [f"{sign} {field.metadata[name]}" for name, (sign, _) in _LIMITS.items() if name in field.metadata]
    names = [name for kind in _kinds(field) for name in _NAMES.get(kind, get_args(kind))]
    numeric = _NAMES[int] + _NAMES[float]
    words = [f"{name} {' and '.join(limits)}" if limits and name in numeric else name for name in names]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _found(node: yaml.Node) -> str:
    """What stands there, and what YAML takes it for."""
    value = _value(node)
    if value is None:
        return "null"
    if not isinstance(node, yaml.ScalarNode):
        return _text(node)
    kinds = {str: "a string", bool: "a boolean", int: "an integer", float: "a float"}
    text = repr(_text(node)) if isinstance(value, str) else _text(node)
    return f"{text}, {kinds.get(type(value), 'which no key can take')}"


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return _short(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _short(text: str) -> str:
    """One line of at most 60 characters."""
    line = repr(text)[1:-1] if not text.isprintable() else text
    return line if len(line) <= 60 else line[:57] + "..."
