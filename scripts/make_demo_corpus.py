"""Writes English text to train a demo on: the documentation that is installed with Python, one sample a line."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.cli import Parser, console, run_command
from l1_jax.errors import UserError


def main(argv: list[str]) -> None:
    parser = Parser(__doc__ or "")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the text file to write")
    parser.add_argument("--max-bytes", type=int, default=7_000_000, help="when to stop; packages get equal shares")
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --output")
    args = parser.parse_args(argv)
    if args.output.is_dir() or (args.output.exists() and not args.overwrite):
        raise UserError(f"{args.output} exists", "Choose another --output, or replace it with --overwrite")

    from l1_jax.data.demo_corpus import harvest

    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_name(f".{args.output.name}.partial-{os.getpid()}")
    try:
        with console.status("reading the installed documentation"), partial.open("w", encoding="utf-8") as file:
            num_samples = sum(file.write(f"{sample}\n") > 0 for sample in harvest(args.max_bytes))
        partial.rename(args.output)
    finally:
        partial.unlink(missing_ok=True)
    console.print(f"{num_samples:,} samples, {args.output.stat().st_size:,} bytes: {args.output}")


if __name__ == "__main__":
    run_command(main)
