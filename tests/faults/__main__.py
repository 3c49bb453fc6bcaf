"""Runs the fault campaigns and prints their table: `make faults`, or in tests/ `python -m faults [--quick] [NAME ...]`.
The exit code is 1 where a bar is missed."""

import argparse
import datetime
import importlib
import os
import pkgutil
import platform
import re
import sys
import time
from pathlib import Path

import faults
from faults import ROOT

PAGE = ROOT / "docs" / "reliability.md"
VERDICTS = {True: "met", False: "**missed**", None: "not run"}
TABLE = re.compile(r"(?<=<!-- faults: begin -->\n).*?(?=<!-- faults: end -->)", re.DOTALL)


def hardware() -> str:
    """The processor and how many cores a campaign may use."""
    models = (
        re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if sys.platform == "linux"
        else []
    )
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def main() -> int:
    modules = [
        module.name for module in pkgutil.iter_modules(faults.__path__) if module.name != "__main__"
    ]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"the campaigns: all, or some of {', '.join(modules)}",
    )
    parser.add_argument("--quick", action="store_true", help="the part that the tests run")
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}"
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(modules):
        parser.error(f"no campaign {', '.join(sorted(unknown))}")
    lines, missed = ["| fault | bar | figure | |", "|---|---|---|---|"], 0
    begin = time.perf_counter()
    for name in args.names or modules:
        start = time.perf_counter()
        for fault, bar, figure, is_met in importlib.import_module(f"faults.{name}").campaign(
            not args.quick
        ):
            cells = (cell.replace("|", "\\|") for cell in (fault, bar, figure, VERDICTS[is_met]))
            lines.append(f"| {' | '.join(cells)} |")
            missed += is_met is False
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    today, kind = datetime.datetime.now(datetime.UTC).date(), "quick" if args.quick else "full"
    seconds = time.perf_counter() - begin
    lines += [
        "",
        f"The {kind} campaigns on {today}: {hardware()}; {seconds:.0f} s in all. The seeds are in `tests/faults/`.",
    ]
    table = "\n".join(lines) + "\n"
    print(table)
    if args.write:
        text, count = TABLE.subn(lambda _: table, PAGE.read_text("utf-8"))
        if count != 1:
            parser.error(f"{PAGE} has not one place for the table")
        PAGE.write_text(text, "utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
