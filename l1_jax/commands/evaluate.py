"""Evaluate a model on text: loss, perplexity, bits per byte.

Example: `python scripts/evaluate.py --model checkpoints/best_model --data FILE.txt`
"""

import argparse
import dataclasses
import json
import math

from l1_jax.commands.flags import Parser, add_device_flags, add_model_flags, add_process_flags

MEMORY_REMEDY = "Lower --batch-size"


def main(argv: list[str]) -> None:
    args = _parse(argv)

    # A signal is heard before these imports, which take a while.
    from l1_jax.commands.flags import parse_mesh
    from l1_jax.devices import processes
    from l1_jax.evaluation.text import evaluate

    processes.start(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
    result = evaluate(
        args.model,
        args.data,
        device=args.device,
        batch_size=args.batch_size,
        mesh=parse_mesh(args.mesh),
        weights=args.weights,
        logprobs=args.logprobs,
        overwrite=args.overwrite,
    )
    if not processes.is_main():
        return

    if args.json:
        # JSON has no infinity.
        figures = {
            name: value if math.isfinite(value) else None
            for name, value in dataclasses.asdict(result).items()
        }
        print(json.dumps(figures))
    else:
        print(f"loss            {result.loss:.4f} nats per token")
        print(f"perplexity      {result.perplexity:,.6g}")
        print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"on              {result.tokens:,} tokens, {result.bytes:,} bytes")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("Loss, perplexity and bits per byte of a model on text.")

    add_model_flags(parser)
    parser.add_path(
        "--data",
        required=True,
        metavar="PATH",
        help="a text file, or a prepared directory (its test split); or a URL",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences per device at a time"
    )

    parser.add_path(
        "--logprobs", metavar="FILE", help="write a JSON line for each token, with its logprob"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file at --logprobs")

    add_device_flags(parser)
    add_process_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    return parser.parse_args(argv)
