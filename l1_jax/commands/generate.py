"""Generate text: `python scripts/generate.py --model checkpoints/best_model --prompt TEXT`."""

import argparse
import dataclasses
import json

from l1_jax.commands.flags import Parser, add_device_flags, add_model_flags, add_process_flags
from l1_jax.errors import UserError

MEMORY_REMEDY = "Lower --num-samples or --max-tokens"

# The flags that take the place of a key of the config; None where they are not given.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def main(argv: list[str]) -> None:
    args = _parse(argv)
    _check(args)

    # A signal is heard before these imports, which take a while.
    import jax

    from l1_jax.commands.flags import parse_mesh
    from l1_jax.devices import processes
    from l1_jax.devices.compiled import keep_compiled
    from l1_jax.devices.select import select_devices
    from l1_jax.inference.generate import Generator, choose_generation
    from l1_jax.loading import load_model

    processes.start(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
    with processes.together():
        devices = select_devices(args.device)
        if jax.process_count() == 1 and not args.mesh:
            devices = devices[:1]
        keep_compiled(devices)

        # The model has no name here: the generator makes its own of it, and deletes its arrays.
        generator = Generator(
            load_model(args.model, devices, parse_mesh(args.mesh), weights=args.weights),
            donate=True,
        )

    given = {name: getattr(args, name) for name in _SAMPLING}
    if args.greedy:
        given["temperature"] = 0.0
    sampling = choose_generation(generator.model, given)

    begun = False

    def show(row: int, text: str) -> None:
        nonlocal begun
        print(text if begun else args.prompt + text, end="", flush=True)
        begun = True

    is_streamed = args.num_samples == 1 and not args.json
    completions = generator(
        [args.prompt] * args.num_samples,
        sampling,
        max_tokens=args.max_tokens,
        seed=args.seed,
        stop=args.stop,
        on_text=show if is_streamed and processes.is_main() else None,
    )
    if not processes.is_main():
        return

    if args.json:
        samples = [dataclasses.asdict(completion) for completion in completions]
        print(json.dumps({"prompt": args.prompt, "completions": samples}))
    elif is_streamed:
        # The text is there already: this ends its line.
        print()
    else:
        for number, completion in enumerate(completions, start=1):
            print(f"--- {number} of {args.num_samples} ---\n{args.prompt}{completion.text}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("Continues a prompt with a trained model.")

    # What is continued, and how far.
    add_model_flags(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="new tokens; without it 100, or what the context holds",
    )

    # How the next token is chosen. Defaults are those of the model's config.
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="divides the logits; 0 is greedy (config: 1.0)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample among the K most likely tokens"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the fewest tokens that sum to P"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens less likely than P times the likeliest",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1, repeated tokens are less likely",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")

    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the draws: the same seed, the same text",
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="texts to make")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; repeatable",
    )

    add_device_flags(parser)
    add_process_flags(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON line instead of streaming"
    )
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags are wrong; before anything is loaded."""
    _check_number("--seed", args.seed, 0, 2**32 - 1)
    _check_number("--num-samples", args.num_samples, 1, 2**20)

    if args.greedy and args.temperature:
        what = f"--greedy and --temperature {args.temperature} contradict each other"
        raise UserError(what, "Give one of them")

    if "" in args.stop:
        raise UserError("--stop is empty", "Give the text to stop before, or leave --stop out")


def _check_number(flag: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise UserError(f"{flag} is {value}", f"Give a number from {least} to {most}")
