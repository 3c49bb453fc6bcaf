"""The house stands as docs/design.md draws it; see `house`."""

import ast
import dataclasses
import re
import subprocess
import sys

import house
import pytest
from house import ROOT

from l1_jax.commands.flags import FLAGS, SAMPLING_FLAGS
from l1_jax.config.key import values_of
from l1_jax.config.schema import Config
from l1_jax.config.yaml_file import ORIGINAL_KEYS, load_config
from l1_jax.inference.section import GenerationConfig

ORDER = house.order()


def test_every_module_has_its_room():
    assert sorted(house.modules_there()) == sorted(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_from_above(module):
    below = [f"l1_jax.{other}" for other in ORDER[ORDER.index(module) :]]
    room = module.split(".")[0]

    for name in house.imports_of(house.module_path(module)):
        is_below = any(name == other or name.startswith(f"{other}.") for other in below)
        assert not is_below or (module, name) in house.NOT_YET, f"{module} imports {name}"

        top = name.split(".")[0]
        assert not (room in house.WITHOUT_JAX and top == "jax"), f"{module} imports jax"
        assert house.ONLY_IN.get(top, room) == room, f"{module} imports {top}"

        is_run = name.startswith("l1_jax.run.")
        assert not (room in house.WITHOUT_RUN and is_run), f"{module} imports {name}"


def test_a_section_imports_keys_alone():
    for module in house.SECTIONS:
        ours = [name for name in house.imports_of(house.module_path(module)) if "l1_jax" in name]
        assert all(name.startswith("l1_jax.config.key.") for name in ours), module


def test_no_file_is_long():
    for path in house.modules_there().values():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= house.MOST_LINES, path
        assert max(map(len, lines)) <= house.MOST_COLUMNS, path


@pytest.mark.parametrize("page", house.TABLES)
def test_the_tables_of_the_docs_are_printed(page):
    """`python tests/house.py --write` mends them."""
    name, table = house.TABLES[page]
    found = house.between_marks((ROOT / page).read_text(encoding="utf-8"), name)
    assert found
    assert found[0] == table()


def test_only_commands_know_flags():
    """Elsewhere an argument is named in backquotes, and a command spells it as its flag."""
    for path in house.modules_there().values():
        if "commands" in path.parts:
            continue

        flags = re.findall(r"--[a-z][a-z_-]+", path.read_text(encoding="utf-8"))
        assert set(flags) <= {"--xla_gpu_deterministic_ops"}, path

    assert "--" not in ORIGINAL_KEYS.read_text(encoding="utf-8")


def test_every_argument_that_a_message_names_is_a_flag():
    """In backquotes, in a string that is no docstring; and no name is there that nothing names."""
    named = set(re.findall(r"`([a-z_]+)`", ORIGINAL_KEYS.read_text(encoding="utf-8")))

    for path in house.modules_there().values():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(getattr(node, "body", None), list)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in docstrings and "commands" not in path.parts:
                named |= set(re.findall(r"`([a-z_]+)`", node.value))

    assert named | set(SAMPLING_FLAGS) == set(FLAGS)
    assert set(SAMPLING_FLAGS) == {field.name for field in dataclasses.fields(GenerationConfig)}


def test_rooms_without_jax_import_none():
    """Neither by themselves nor by what they import."""
    modules = [f"l1_jax.{name}" for name in ORDER if name.split(".")[0] in house.WITHOUT_JAX]
    code = f"import sys, {', '.join(modules)}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_commands_know_the_planner():
    for module in ORDER:
        if module.split(".")[0] not in ("planner", "commands"):
            names = house.imports_of(house.module_path(module))
            assert not any(name.startswith("l1_jax.planner") for name in names), module


def test_every_module_says_in_a_line_what_it_is_for():
    for path in house.modules_there().values():
        assert 20 <= len(house.first_line(path)) <= house.MOST_COLUMNS, path


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


def test_requirements_satisfy_the_ranges():
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = re.findall(
        r"^([\w.-]+)==(\S+).*\\\n    --hash=sha256:", (ROOT / "requirements.txt").read_text(), re.M
    )
    pins = {canonicalize_name(name): version for name, version in pinned}
    assert len(pins) == len(
        re.findall(r"^[^\s#]", (ROOT / "requirements.txt").read_text(), re.M)
    )  # all with hashes
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_every_key_is_read(script, tiny_config, prepared, tmp_path, monkeypatch):
    """A key that nothing reads does nothing."""
    read = set()
    # What compares and copies all keys uses none; the last holds generated methods.
    generic = (
        "dataclasses.py",
        "key.py",
        "schema.py",
        "section.py",
        "yaml_file.py",
        "drift.py",
        "<string>",
    )

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
        if field.default is not None:
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
    indirect |= {"model.rope_theta", "training.muon_learning_rate"}
    assert script("generate", "--model", tmp_path, "--prompt", "A", "--max-tokens", 1).code == 0
    indirect |= {"model.head_size", "model.attention_dropout", "transfer.from", "transfer.freeze"}
    assert values_of(Config()).keys() - read == indirect
