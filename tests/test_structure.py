"""The house stands as docs/design.md draws it."""

import ast
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from l1_jax.config import Config
from l1_jax.config_file import SCHEMA, expected, load_config

ROOT = Path(__file__).parents[1]
# A module imports only from rooms above it.
ROOMS = [
    "errors", "files", "interrupts", "cli", "lock", "storage", "config", "config_file",
    "data.corpus", "data.cleaning", "data.tokenizer", "data.token_store", "data.prepare", "data.batches",
    "parallel.processes", "parallel.kinds", "parallel.mesh", "parallel.compiled", "parallel.sharding",
    "parallel.pipeline",
    "model.dropout", "model.layers", "model.attend", "model.backends", "model.attention", "model.transformer",
    "training.schedule", "training.matrices", "training.optimizer", "training.loss", "training.state", "training.step",
    "training.program",
    "training.tracking",
    "mirror", "integrity", "checkpoint", "saver", "loading", "evaluate",
    "inference.sampling", "inference.text_stream", "inference.generate",
    "run.signals", "run.watchdog", "run.goodput", "run.resolve", "run.guard", "run.directory", "run.drift", "verify",
    "planner.collectives", "planner.estimate", "planner.compile", "planner.variants", "planner.plan", "planner.report",
    "loop", "train",
]  # fmt: skip
MODULES = {
    ".".join(path.relative_to(ROOT / "l1_jax").with_suffix("").parts): path
    for path in (ROOT / "l1_jax").rglob("*.py")
    if path.name != "__init__.py"
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_room():
    assert sorted(MODULES) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_module_imports_only_from_above(room):
    below = [f"l1_jax.{other}" for other in ROOMS[ROOMS.index(room) :]]
    for name in imports(MODULES[room]):
        assert not any(name == other or name.startswith(f"{other}.") for other in below), f"{room} imports {name}"
        if room.startswith(("data.", "config", "errors", "cli")):
            assert name.split(".")[0] != "jax", f"{room} imports jax"
        if room not in ("checkpoint", "saver"):
            assert not name.startswith("orbax"), f"{room} imports orbax"


def test_no_file_is_long_and_the_whole_is_small():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "l1_jax").rglob("*.py")}
    assert max(lengths.values()) <= 400
    assert sum(lengths.values()) < 9000


def test_no_unsafe_call():
    unsafe = re.compile(r"\bpickle\b|yaml\.load\(|allow_pickle=True|(?<![\w.])eval\(|torch\.load")
    for path in [*(ROOT / "l1_jax").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        assert not unsafe.search(path.read_text()), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_config_is_a_model(path):
    import jax

    from l1_jax.model.transformer import build

    config = load_config(path)
    _, initialise, _ = build(config.model)
    jax.eval_shape(initialise, jax.random.key(0))
    assert path.read_text().startswith("# ")


def test_the_documented_keys_are_the_keys():
    rows = ["| section | key | type | default | what it is for |", "|---|---|---|---|---|"]
    for section, keys in SCHEMA.items():
        for name, field in keys.items():
            default = json.dumps(field.default)
            rows.append(f"| {section} | `{name}` | {expected(field)} | `{default}` | {field.metadata['doc']} |")
    assert "\n".join(rows) + "\n" in (ROOT / "docs" / "configuration.md").read_text()


def test_requirements_satisfy_the_ranges():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = re.findall(r"^([\w.-]+)==(\S+).*\\\n    --hash=sha256:", (ROOT / "requirements.txt").read_text(), re.M)
    pins = {canonicalize_name(name): version for name, version in pinned}
    assert len(pins) == len(re.findall(r"^[^\s#]", (ROOT / "requirements.txt").read_text(), re.M))  # all with hashes
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_key_is_read(script, tiny_config, prepared, tmp_path, monkeypatch):
    """A key that nothing reads does nothing."""
    read = set()
    # What compares and copies all keys uses none; the last holds generated methods.
    generic = ("dataclasses.py", "config.py", "config_file.py", "drift.py", "<string>")

    def watch(section):
        cls = type(getattr(Config(), section))
        names = {field.name for field in dataclasses.fields(cls)}

        def getattribute(self, name):
            caller = sys._getframe(1).f_code
            if name in names and not caller.co_filename.endswith(generic):
                read.add(f"{section}.{name}")
            return object.__getattribute__(self, name)

        monkeypatch.setattr(cls, "__getattribute__", getattribute)

    for field in dataclasses.fields(Config):
        watch(field.name)
    args = (
        "--config",
        tiny_config,
        f"data.path={prepared}",
        f"training.output_dir={tmp_path}",
        "training.num_epochs=0.01",
    )
    assert script("train", *args).code == 0
    # read through a property, for its rule, or only where the thing that it configures is in use
    indirect = {"model.n_inner", "model.n_kv_heads", "training.wandb_run_name"}
    indirect |= {"model.rope_theta", "training.decay_fraction", "training.muon_learning_rate"}
    assert script("generate", "--model", tmp_path, "--prompt", "A", "--max-tokens", 1).code == 0
    every = {
        f"{s.name}.{key.name}"
        for s in dataclasses.fields(Config)
        for key in dataclasses.fields(getattr(Config(), s.name))
    }
    assert every - read == indirect
