"""The house: rooms and files in the order in which they may import, and the tables of the docs.

`python tests/house.py --write` puts the tables into docs/design.md and docs/configuration.md.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "l1_jax"

# A room imports only from rooms above it; inside a room a file only from files before it.
ROOMS = {
    "errors": [],
    "console": [],
    "storage": ["files", "lock", "remote"],
    "config": ["key", "values", "schema", "yaml_file", "stages", "resolve"],
    "devices": ["kinds", "memory", "processes", "select", "compiled"],
    "data": [
        "cleaning", "readers.lines", "readers.text", "readers.jsonl", "readers.documents", "tokenizer", "byte_level", "tokenizer_kinds", "store", "prepare", "sources", "batches",
    ],
    "parallel": ["mesh", "sharding", "layout", "placement", "pipeline"],
    "checkpoint": [
        "names", "mirror", "manifest", "write", "restore", "saver", "run_directory", "origin",
        "resuming", "verify",
    ],
    "model": [
        "dropout", "packed", "context", "layers", "attend", "backends", "attention", "block",
        "stack", "flops", "transformer",
    ],
    "objectives": ["objective", "chunks", "cross_entropy", "log_probs", "next_token", "table"],
    "training": [
        "health", "average", "state", "schedule", "matrices", "optimizer", "step", "program", "initial",
    ],
    "loading": [],
    "inference": ["sampling", "rows", "engine", "text_stream", "generate"],
    "evaluation": ["log_probs", "text"],
    "run": [
        "signals", "watchdog", "goodput", "speed", "tracking", "guard", "drift", "loop", "start",
        "setup", "train",
    ],
    "compression": ["pack"],
    "planner": [
        "collectives", "state_size", "estimate", "batch_size", "compile", "variants", "plan", "report",
    ],
    "commands": [
        "interrupts", "flags", "runner", "prepare_data", "train", "evaluate", "generate", "plan",
        "verify", "make_demo_corpus", "main",
    ],
}  # fmt: skip

# One layer between config/key.py and config/schema.py: the keys of a room, declared in it.
SECTIONS = [
    f"{room}.section"
    for room in ("data", "inference", "model", "objectives", "parallel", "training")
]

# Who may import what is not everyone's.
WITHOUT_JAX = ("errors", "console", "storage", "config", "data")
ONLY_IN = {"orbax": "checkpoint"}
WITHOUT_RUN = ("model", "objectives", "checkpoint", "data")

MOST_LINES = 500
MOST_COLUMNS = 100

# What still imports from below.
NOT_YET: set[tuple[str, str]] = set()


def order() -> list[str]:
    """All modules, dotted, in the order in which they may import."""
    modules = []

    for room, files in ROOMS.items():
        for name in files or [""]:
            modules.append(f"{room}.{name}" if name else room)

            if modules[-1] == "config.key":
                modules += SECTIONS

    return modules


def module_path(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def modules_there() -> dict[str, Path]:
    """The modules of the package that are more than a namespace."""
    found = {}

    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path

    return found


def imports_of(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def first_line(path: Path) -> str:
    """What a module says that it is for."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")


def count_tokens(path: Path) -> int:
    """The size of a file: its tokens, without docstrings, comments and layout."""
    layout = {
        tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
        tokenize.ENCODING, tokenize.ENDMARKER,
    }  # fmt: skip
    text = path.read_text(encoding="utf-8")
    tokens = 0

    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        tokens += token.type not in layout and not is_docstring

    return tokens


def house_table() -> str:
    """The modules with what they are for and their size, for docs/design.md."""
    rows = ["| file in `l1_jax/` | job | tokens |", "|---|---|---|"]

    for module in order():
        path = module_path(module)
        name = path.relative_to(PACKAGE).as_posix()
        rows.append(f"| `{name}` | {first_line(path)} | {count_tokens(path):,} |")

    return "\n".join(rows)


def keys_table() -> str:
    """Every key of the config, for docs/configuration.md."""
    from l1_jax.config.key import keys_of, to_plain
    from l1_jax.config.schema import Config
    from l1_jax.config.values import expected

    rows = [
        "| key | type | default | what it is for | changed at a resume |",
        "|---|---|---|---|---|",
    ]
    meaning = {"never": "refused always", "fatal": "refused", "warned": "warned of", "free": "free"}

    for name, field in keys_of(Config):
        default = json.dumps(to_plain(field.default))
        doc = field.metadata["doc"]

        if used_with := field.metadata["used_with"]:
            cases = " or ".join(f"`{case}`" for case in used_with)
            doc += f" (with {cases})"

        resume = meaning[field.metadata["resume"]]
        rows.append(f"| `{name}` | {expected(field)} | `{default}` | {doc} | {resume} |")

    return "\n".join(rows)


TABLES = {"docs/design.md": ("house", house_table), "docs/configuration.md": ("keys", keys_table)}


def between_marks(text: str, name: str) -> re.Match[str] | None:
    """The part of a page that is printed by this file."""
    return re.search(
        rf"(?<=<!-- {name}: begin -->\n).*?(?=\n<!-- {name}: end -->)", text, re.DOTALL
    )


def main() -> None:
    for page, (name, table) in TABLES.items():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        found = between_marks(text, name)
        assert found, f"{page} has no marks <!-- {name}: begin --> and <!-- {name}: end -->"

        if "--write" in sys.argv:
            path.write_text(text[: found.start()] + table() + text[found.end() :], encoding="utf-8")
        else:
            print(table())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
