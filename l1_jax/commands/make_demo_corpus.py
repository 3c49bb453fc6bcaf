"""Writes English text to train a demo on.

It is the documentation that is installed with Python, one sample a line.
"""

import argparse
import ast
import contextlib
import hashlib
import heapq
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from l1_jax.commands.flags import Parser
from l1_jax.console import console
from l1_jax.errors import UserError
from l1_jax.storage.files import new_file

# Directories of tests, of data, and site-packages, which is searched by itself.
_SKIPPED = {
    "__pycache__",
    "site-packages",
    "test",
    "tests",
    "testing",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
}

# Of a sample.
_MIN_CHARS = 40
# Of a paragraph's words; below this it reads like code.
_PLAIN_WORDS = 0.8
# Of a file's bytes; with less it is not worth the time to parse it.
_MIN_QUOTED = 0.3

_QUOTED = re.compile(rb"(\"\"\"|''')(.*?)\1", re.DOTALL)

# Doctests, directives, fields, tables, bullets, `Args:`, underlines, anything indented.
_REFERENCE = re.compile(
    r"^( |>>>|\.\. |[:@|+*#-]|\w+[):.]? *$|\(?\d+[.)]|[\w, *]+:( |$)|[-=~*^]{3})", re.MULTILINE
)

# A blank line, a heading and its underline, an entry `name : type` or `name:`: what follows may be
# prose.
_PARAGRAPH_END = re.compile(
    r"\n\s*\n|^.*\n\s*[-=~]{3,}\s*\n|^ *[\w*, ]+ : .*\n|^ *\*?\w+(?: \([^)\n]*\))?:(?=\s)",
    re.MULTILINE,
)

# Patterns, and what takes their place.
_MARKUP = (
    # :class:`~a.B`, :ref:`text <target>`
    (re.compile(r":[\w:+-]+:`[~.!]*([^`<]*?)\s*(<[^`]*>)?`"), r"\1"),
    # [text](target)
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),
    # `code`, *stress*, target_
    (re.compile(r"[`*]+([^`*]+)[`*]+_{0,2}"), r"\1"),
    # A colon that begins a literal block.
    (re.compile(r"\s*::$"), ":"),
    (re.compile(r"\s+"), " "),
)

_SENTENCES = re.compile(r"[\"'(]?[A-Z].*[.!?:]")
_PLAIN_WORD = re.compile(r"[\"'(]*([A-Z]?[a-z]+|[AI])(['-][A-Za-z]+)*[\"').,:;!?]*|-|--")
_LEGAL = re.compile(r"copyright|licen[cs]e|https?:|TODO|deprecated", re.IGNORECASE)


def harvest(max_bytes: int) -> Iterator[str]:
    """English documentation, one line a sample, the same for the same installation.

    Args:
        max_bytes: when to stop; until then the package that has given least gives next.
    """
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    packages = []
    for root in roots:
        packages += [(path.name, path) for path in root.iterdir() if path.name not in _SKIPPED]

    seen: set[str] = set()
    topic_texts = (topics[name] for name in sorted(topics))
    sources = [topic_texts, *(_docstrings(path) for _, path in sorted(packages))]
    samples = [_samples(source, seen) for source in sources]

    # A heap of (characters given so far, number of the source).
    given = [(0, index) for index in range(len(samples))]
    total_bytes = 0
    while given:
        num_chars, index = heapq.heappop(given)
        text = next(samples[index], None)
        if text is None:
            continue

        total_bytes += len(text.encode()) + 1
        if total_bytes > max_bytes:
            return

        heapq.heappush(given, (num_chars + len(text), index))
        yield text


def _docstrings(package: Path) -> Iterator[str]:
    """The docstrings of a module or a package, which is not imported.

    Its files come in an order that mixes its parts.
    """
    if package.is_file():
        files = [package]
    else:
        files = [
            path
            for path in package.rglob("*.py")
            if not _SKIPPED & set(path.relative_to(package).parts)
        ]

    def mixed(path: Path) -> bytes:
        name = str(path.relative_to(package.parent))
        return hashlib.sha256(name.encode()).digest()

    for path in sorted(files, key=mixed):
        if path.suffix == ".py":
            yield from _docstrings_of(path.read_bytes())


def _docstrings_of(source: bytes) -> list[str]:
    """The docstrings of a file.

    A list, because a generator would keep the tree, and hundreds of trees make Python's collector
    slow.
    """
    found: list[str] = []

    num_quoted = sum(len(match[2]) for match in _QUOTED.finditer(source))
    if num_quoted < _MIN_QUOTED * len(source):
        return found

    # A file that is meant for another Python cannot be parsed.
    with contextlib.suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        # Other people's invalid escapes.
        warnings.simplefilter("ignore")

        # This list grows on the way.
        nodes: list[ast.AST] = [ast.parse(source)]
        for node in nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                nodes.extend(node.body)
                found.append(ast.get_docstring(node, clean=False) or "")

    return found


def _samples(docstrings: Iterator[str], seen: set[str]) -> Iterator[str]:
    """The prose of each, whitespace collapsed; a paragraph counts once in the whole corpus."""
    for docstring in docstrings:
        kept = []
        for paragraph in _PARAGRAPH_END.split(inspect.cleandoc(docstring)):
            text = _prose(paragraph)
            if text is not None and text not in seen:
                seen.add(text)
                kept.append(text)

        sample = " ".join(kept).strip()
        if len(sample) >= _MIN_CHARS:
            yield sample


def _prose(paragraph: str) -> str | None:
    """A paragraph without its markup; None where it is no prose."""
    text = inspect.cleandoc(paragraph)
    if _REFERENCE.search(text) or _LEGAL.search(text):
        return None

    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)

    words = text.split()
    num_plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    is_plain = num_plain >= _PLAIN_WORDS * len(words)
    return text if is_plain and _SENTENCES.fullmatch(text) else None


def main(argv: list[str]) -> None:
    args = _parse(argv)
    output = Path(args.output)

    if output.is_dir() or (output.exists() and not args.overwrite):
        what = f"{output} exists"
        raise UserError(what, "Choose another --output, or replace it with --overwrite")

    output.parent.mkdir(parents=True, exist_ok=True)
    num_samples = 0
    with console.status("reading the installed documentation"), new_file(output) as file:
        for sample in harvest(args.max_bytes):
            file.write(f"{sample}\n")
            num_samples += 1

    console.print(f"{num_samples:,} samples, {output.stat().st_size:,} bytes: {output}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "Writes English text to train a demo on: the documentation that is installed with "
        "Python, one sample a line."
    )
    parser.add_path("--output", required=True, metavar="FILE", help="the text file to write")
    parser.add_argument(
        "--max-bytes", type=int, default=7_000_000, help="when to stop; packages get equal shares"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --output")
    return parser.parse_args(argv)
