"""Writes English text to train a demo on: the documentation that is installed with Python, one
sample a line."""

import ast
import contextlib
import hashlib
import heapq
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from l1_jax.commands.flags import Parser
from l1_jax.console import console
from l1_jax.errors import UserError

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
_QUOTED = re.compile(rb"(\"\"\"|''')(.*?)\1", re.DOTALL)
_MIN_QUOTED = 0.3  # of a file's bytes; with less it is not worth the time to parse it
_MIN_CHARS = 40
_PLAIN_WORDS = 0.8  # of a paragraph's words; below this it reads like code
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
_MARKUP = (
    (
        re.compile(r":[\w:+-]+:`[~.!]*([^`<]*?)\s*(<[^`]*>)?`"),
        r"\1",
    ),  # :class:`~a.B`, :ref:`text <target>`
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](target)
    (re.compile(r"[`*]+([^`*]+)[`*]+_{0,2}"), r"\1"),
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
    packages = sorted(
        (path.name, path) for root in roots for path in root.iterdir() if path.name not in _SKIPPED
    )
    seen: set[str] = set()
    sources = [
        (topics[name] for name in sorted(topics)),
        *(_docstrings(path) for _, path in packages),
    ]
    samples = [_samples(source, seen) for source in sources]
    given = [(0, index) for index in range(len(samples))]
    total = 0
    while given:
        size, index = heapq.heappop(given)
        if (text := next(samples[index], None)) is not None:
            total += len(text.encode()) + 1
            if total > max_bytes:
                return
            heapq.heappush(given, (size + len(text), index))
            yield text


def _docstrings(package: Path) -> Iterator[str]:
    """Of a module or a package, without importing it; its files in an order that mixes its
    parts."""
    files = (
        [package]
        if package.is_file()
        else [p for p in package.rglob("*.py") if not _SKIPPED & set(p.relative_to(package).parts)]
    )
    for path in sorted(
        files, key=lambda p: hashlib.sha256(str(p.relative_to(package.parent)).encode()).digest()
    ):
        if path.suffix == ".py":
            yield from _docstrings_of(path.read_bytes())


def _docstrings_of(source: bytes) -> list[str]:
    """A list, because a generator would keep the tree, and hundreds of trees make Python's
    collector slow."""
    found: list[str] = []
    if sum(len(match[2]) for match in _QUOTED.finditer(source)) < _MIN_QUOTED * len(source):
        return found
    with contextlib.suppress(SyntaxError, ValueError, RecursionError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        nodes: list[ast.AST] = [ast.parse(source)]  # fails where it is meant for another Python
        for node in nodes:  # grows on the way
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                nodes.extend(node.body)
                found.append(ast.get_docstring(node, clean=False) or "")
    return found


def _samples(docstrings: Iterator[str], seen: set[str]) -> Iterator[str]:
    """The prose of each, whitespace collapsed; a paragraph counts once in the whole corpus."""
    for docstring in docstrings:
        kept = []
        for paragraph in _PARAGRAPH_END.split(inspect.cleandoc(docstring)):
            paragraph = inspect.cleandoc(paragraph)
            if _REFERENCE.search(paragraph) or _LEGAL.search(paragraph):
                continue
            for pattern, replacement in _MARKUP:
                paragraph = pattern.sub(replacement, paragraph)
            words = paragraph.split()
            plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
            if (
                paragraph not in seen
                and _SENTENCES.fullmatch(paragraph)
                and plain >= _PLAIN_WORDS * len(words)
            ):
                seen.add(paragraph)
                kept.append(paragraph)
        sample = " ".join(kept).strip()
        if len(sample) >= _MIN_CHARS:
            yield sample


def main(argv: list[str]) -> None:
    parser = Parser(__doc__ or "")
    parser.add_path("--output", required=True, metavar="FILE", help="the text file to write")
    parser.add_argument(
        "--max-bytes", type=int, default=7_000_000, help="when to stop; packages get equal shares"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --output")
    args = parser.parse_args(argv)
    args.output = Path(args.output)
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise UserError(
            f"{args.output} exists", "Choose another --output, or replace it with --overwrite"
        )

    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f".{args.output.name}.partial-{os.getpid()}")
    try:
        with (
            console.status("reading the installed documentation"),
            partial.open("w", encoding="utf-8") as file,
        ):
            num_samples = sum(file.write(f"{sample}\n") > 0 for sample in harvest(args.max_bytes))
        partial.rename(args.output)
    finally:
        partial.unlink(missing_ok=True)
    console.print(f"{num_samples:,} samples, {args.output.stat().st_size:,} bytes: {args.output}")
