"""Train a language model: `python scripts/train.py --config FILE.yaml [section.key=value ...]`."""

import os
from collections.abc import Collection
from pathlib import Path

from l1_jax.commands.flags import Parser, add_process_flags
from l1_jax.config.schema import Config
from l1_jax.errors import UserError


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
) -> int:
    """Trains as `config` says: `run.train.train`, with the planner's answer where
    `training.batch_size` is auto."""
    from l1_jax.planner.batch_size import choose_batch_size
    from l1_jax.run.train import train as train_run

    return train_run(
        config,
        resume=resume,
        resume_from=resume_from,
        overwrite=overwrite,
        allow_change=allow_change,
        choose_batch_size=choose_batch_size,
    )


def main(argv: list[str]) -> int:
    parser = Parser(
        "Trains a language model on a prepared directory.", epilog="Keys: docs/configuration.md"
    )
    parser.add_path(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML; keys that are not in it have defaults",
    )
    parser.add_path(
        "--resume", nargs="?", const=True, default=None, metavar="PATH",
        help="go on with the run in training.output_dir, from its newest checkpoint or from PATH",
    )  # fmt: skip
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="NAME",
        help="resume although this changed, as data or training.seed; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in training.output_dir"
    )
    add_process_flags(parser)
    parser.add_argument("--local-rank", "--local_rank", help="refused: torchrun is not needed here")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override keys of the config"
    )
    overrides, args = parser.parse_overrides(argv)
    torchrun = (
        args.local_rank is not None
        or {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
    )
    if torchrun:
        raise UserError(
            "torchrun and torch.distributed.launch start one process per GPU, and here one "
            "process uses them all",
            f"Run python scripts/train.py --config {args.config}",
        )
    if args.overrides:
        raise UserError(
            f"{args.overrides[0]!r} is no override",
            "Write section.key=value, as training.max_steps=100",
        )
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other", "Give one of them")
    if args.allow_change and args.resume is None:
        raise UserError(
            "--allow-change is given without --resume", "It is for a run that goes on: give both"
        )

    from l1_jax.checkpoint import resuming
    from l1_jax.config.yaml_file import load_config
    from l1_jax.devices import processes
    from l1_jax.devices.select import make_deterministic
    from l1_jax.run import signals
    from l1_jax.run.watchdog import Watchdog
    from l1_jax.training.section import TrainingConfig

    resume = args.resume is not None
    resume_from = args.resume if isinstance(args.resume, str) else None
    with Watchdog(
        args.join_timeout + TrainingConfig.hang_timeout_seconds
    ):  # the config, if any, is not known yet
        processes.start(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
        with processes.together():
            config = load_config(args.config, overrides)
            if not any(override.startswith("training.output_dir=") for override in overrides):
                written = config.training.output_dir
                home = resuming.home_of(
                    Path(args.config), written, resume=resume, overwrite=args.overwrite
                )
                config = config.replace("training", output_dir=home)
            if config.training.deterministic:
                make_deterministic()  # before the processes talk to one another, which starts jax
    try:
        return train(
            config,
            resume=resume,
            resume_from=resume_from,
            overwrite=args.overwrite,
            allow_change=args.allow_change,
        )
    finally:
        signals.ignore()  # else `stop`, which is back, would end what has ended with 75
