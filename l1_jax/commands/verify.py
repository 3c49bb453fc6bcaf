"""Look for damage: `python scripts/verify.py checkpoints`."""

import json

from l1_jax.commands.flags import Parser
from l1_jax.console import EXIT_FAILURE, EXIT_OK


def main(argv: list[str]) -> int:
    parser = Parser(
        "Compares every file of checkpoints or prepared data with its hash. Exit code 1: "
        "one is damaged."
    )
    parser.add_path(
        "path", metavar="PATH", help="a run directory, a checkpoint, prepared data; or a URL"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    args = parser.parse_args(argv)

    # A signal is heard before this import, which takes a while.
    from l1_jax.checkpoint.verify import verify_path

    damage_of = verify_path(args.path)
    if args.json:
        print(json.dumps({"path": args.path, "damage": damage_of}))
    else:
        for name, damage in damage_of.items():
            print(f"{name}: damaged: {damage}" if damage else f"{name}: ok")

    is_damaged = any(damage_of.values())
    return EXIT_FAILURE if is_damaged else EXIT_OK
