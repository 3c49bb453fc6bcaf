#!/usr/bin/env python3
"""Generate text: `python scripts/generate.py --model checkpoints/best_model --prompt TEXT`."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l1_jax.cli import Parser, run_command


def main(argv: list[str]) -> None:
    parser = Parser("Continues a prompt with a trained model.")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="a checkpoint, or a run directory (its best model)"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="new tokens; without it 100, or what the context holds"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="divides the logits; 0 is greedy (config: 1.0)")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample among the fewest tokens that sum to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1, repeated tokens are less likely"
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws: the same seed, the same text")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to make")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "gpu", "cuda", "tpu"), help="what to run on"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of streaming")
    args = parser.parse_args(argv)

    from l1_jax.inference.generate import generate_path

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    result = generate_path(
        args.model,
        args.prompt,
        {name: getattr(args, name) for name in names},
        greedy=args.greedy,
        num_samples=args.num_samples,
        device=args.device,
        stream=not args.json,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=args.stop,
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
