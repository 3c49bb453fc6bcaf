"""What a run needs and costs on devices that are not here.

Example: `python scripts/plan.py --config FILE --devices 8`
"""

import argparse
import json
from collections.abc import Sequence

from l1_jax.commands.flags import Parser, spell_flags
from l1_jax.errors import UserError


def main(argv: list[str]) -> None:
    overrides, args = _parse(argv)

    # A signal is heard before these imports, which take a while.
    from l1_jax.commands.flags import parse_mesh
    from l1_jax.config.yaml_file import load_config
    from l1_jax.planner.plan import plan
    from l1_jax.planner.report import figures, report

    config = load_config(args.config, overrides)
    sizes = parse_mesh(args.mesh) if args.mesh else None
    result = plan(config, args.device_kind, args.devices, sizes, ranks_meshes=args.search)

    if args.json:
        print(json.dumps(figures(result)))
    else:
        print(spell_flags(report(result)))


def _parse(argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """The overrides, and the flags."""
    parser = Parser(
        "Memory, traffic and time of a training run on devices that are not here.",
        epilog="docs/planning.md",
    )

    parser.add_path("--config", required=True, metavar="FILE", help="YAML, as for train.py")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many; a slice such as v5e:2x4 says it by itself",
    )
    kinds = (
        "H100, H200, A100, A100 40GB, L4, 'RTX 3080 12GB', 'RTX 4090', v4, v5e, v5p, "
        "v6e, or a slice as v5e:2x4"
    )
    parser.add_argument("--device-kind", default="H100", metavar="KIND", help=kinds)
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="instead of the config's parallelism: fsdp=4,tensor=2"
    )
    parser.add_argument(
        "--search", action="store_true", help="rank the legal meshes by estimated step time"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON line")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override keys of the config"
    )

    overrides, args = parser.parse_overrides(argv)
    if args.overrides:
        what = f"{args.overrides[0]!r} is no override"
        raise UserError(what, "Write section.key=value, as training.max_steps=100")
    return overrides, args
