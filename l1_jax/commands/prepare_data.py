"""Turns text files into a prepared directory: splits, tokenizer, tokens."""

import argparse
import json
from typing import Any

from l1_jax.commands.flags import Parser
from l1_jax.commands.interrupts import unwinding
from l1_jax.console import console

# The guide's model sizes, and the training tokens that each asks for.
SIZES = {"tiny": 10**6, "small": 10**7, "base": 10**8, "large": 10**9}

# What is counted in each split.
_COUNTS = ("documents", "tokens", "bytes")

MEMORY_REMEDY = "Give less text in --input, or use a machine with more memory"


def main(argv: list[str]) -> None:
    args = vars(_parse(argv))
    inputs = args.pop("input")
    as_json = args.pop("json")

    # A signal is heard before this import, which takes a while.
    from l1_jax.data.prepare import prepare

    with unwinding():
        manifest = prepare(inputs, **args)

    print_summary(manifest)
    console.print(f"prepared {args['output']}")
    if as_json:
        print(json.dumps(manifest))


def _parse(argv: list[str]) -> argparse.Namespace:
    """The flags; but for --input and --json they are arguments of `prepare`."""
    parser = Parser(__doc__ or "")

    # From where to where.
    formats = "text files (.txt; .jsonl with the key text; either as .gz), or directories of them"
    parser.add_path("--input", nargs="+", required=True, metavar="PATH", help=formats)
    parser.add_path(
        "--output", default="data/processed", metavar="DIR", help="the directory to make; or a URL"
    )

    # How.
    parser.add_argument(
        "--vocab-size", type=int, default=50257, help="the most tokens that the tokenizer may have"
    )
    parser.add_argument(
        "--train-ratio", type=float, default=0.8, help="the part of the text for training"
    )
    parser.add_argument(
        "--val-ratio",
        type=float,
        default=0.1,
        help="the part for validation; the rest is for testing",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the random split")
    documents = "what a document is: a line, or a whole file"
    parser.add_argument("--documents", choices=["line", "file"], default="line", help=documents)
    split = (
        "random: by each document's text and the seed; contiguous: first part, middle part, "
        "last part"
    )
    parser.add_argument("--split", choices=["random", "contiguous"], default="random", help=split)
    tokenizer = (
        "bpe: trained on the training split; bytes: a token a byte; or the path of a tokenizer.json"
    )
    parser.add_path("--tokenizer", default="bpe", metavar="bpe|bytes|PATH", help=tokenizer)
    parser.add_argument(
        "--no-dedup", dest="dedup", action="store_false", help="keep documents that repeat exactly"
    )

    parser.add_argument(
        "--overwrite", action="store_true", help="replace the prepared directory at --output"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the manifest on stdout, as one line of JSON"
    )
    return parser.parse_args(argv)


def print_summary(manifest: dict[str, Any]) -> None:
    """Prints what a person wants to know of a prepared directory."""
    from rich.table import Table

    ledger = manifest["ledger"]
    splits = manifest["splits"]

    reasons = [f"{count:,} {reason}" for reason, count in ledger["dropped"].items()]
    dropped = ", ".join(reasons) or "none"
    console.print(
        f"documents: {ledger['read']:,} read, {ledger['kept']:,} kept; dropped: {dropped}"
    )

    table = Table("split")
    for column in (*_COUNTS, "bytes per token"):
        table.add_column(column, justify="right")
    for name, counts in splits.items():
        ratio = f"{counts['bytes'] / counts['tokens']:.2f}" if counts["documents"] else "-"
        table.add_row(name, *(f"{counts[key]:,}" for key in _COUNTS), ratio)
    console.print(table)

    num_tokens = splits["train"]["tokens"]
    enough = [name for name, size in SIZES.items() if num_tokens >= size]
    wanted = ", ".join(f"{name} {size:,}" for name, size in SIZES.items())
    console.print(
        f"{num_tokens:,} training tokens are enough for: {', '.join(enough) or 'none yet'} "
        f"(wanted: {wanted})"
    )
