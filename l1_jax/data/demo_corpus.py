"""English to train a demo on, where nothing can be downloaded: the documentation that is already installed."""

import ast
import inspect
import itertools
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_MAX_FILE_BYTES = 1 << 20  # beyond this a .py file is generated tables
_SKIPPED = {"site-packages", "test", "tests", "testing", "pydoc_data", "idlelib", "lib2to3", "encodings"}
# Where prose ends and reference begins: `Args:`, `Parameters` underlined, `.. note::`, `:param x:`, `>>>`.
_REFERENCE = re.compile(r"^\s*(>>>|\.\. |:\w+.*:|@\w|[A-Z]\w*( \w+)?:\s*$)|^\s*[-=~*^]{3,}\s*$", re.MULTILINE)
_HEADING = re.compile(r"^[^\n]*\n\s*[-=~*^]{3,}\s*\n", re.MULTILINE)
_MARKUP = [
    (re.compile(r":[\w:+-]+:`~?\.?([^`<]*?)\s*(<[^`]*>)?`"), r"\1"),  # :class:`~a.B`, :ref:`text <target>`
    (re.compile(r"`{1,2}([^`]*)`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}(\w[^*\n]*?)\*{1,2}"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](target)
    (re.compile(r"\s+"), " "),
]
_SENTENCE = re.compile(r"[A-Z][a-z]*[ ,'].*[.!?]")
_ODD = re.compile(r"[^A-Za-z ,.;'\"-]")


def harvest(max_bytes: int) -> Iterator[str]:
    """English documentation, a sample a line, the same for the same installation.

    Args:
        max_bytes: the most bytes to give, shared so that no package has more while another has samples left.
    """
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    packages = [[standard / "pydoc_data" / "topics.py"], _sources(standard)]
    packages += [_sources(path) for path in sorted(installed.iterdir()) if path.is_dir()]
    seen: set[str] = set()
    queues = [_samples(files, seen) for files in packages]
    spent = [0] * len(queues)
    while live := [i for i, _ in enumerate(queues)]:
        pass
