"""Evaluate a model on text: `python scripts/evaluate.py --model checkpoints/best_model --data
FILE.txt`."""

import dataclasses
import json
import math

from l1_jax.commands.flags import Parser, add_device_flags, add_process_flags

MEMORY_REMEDY = "Lower --batch-size"


def main(argv: list[str]) -> None:
    parser = Parser("Loss, perplexity and bits per byte of a model on text.")
    parser.add_path(
        "--model",
        required=True,
        metavar="PATH",
        help="a checkpoint, or a run directory (its best model); or a URL",
    )
    parser.add_path(
        "--data",
        required=True,
        metavar="PATH",
        help="a text file, or a prepared directory (its test split); or a URL",
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="sequences per device at a time"
    )
    add_device_flags(parser)
    add_process_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    args = parser.parse_args(argv)

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
    )
    if not processes.is_main():
        return
    if args.json:
        figures = dataclasses.asdict(result)  # JSON has no infinity
        print(
            json.dumps(
                {name: value if math.isfinite(value) else None for name, value in figures.items()}
            )
        )
    else:
        print(
            f"loss            {result.loss:.4f} nats per token\n"
            f"perplexity      {result.perplexity:,.6g}\n"
            f"bits per byte   {result.bits_per_byte:.4f}\n"
            f"on              {result.tokens:,} tokens, {result.bytes:,} bytes"
        )
