"""Train a language model: `python scripts/train.py --config FILE.yaml [section.key=value ...]`."""

import argparse
import os
from collections.abc import Collection
from pathlib import Path

from l1_jax.commands.flags import Parser, add_process_flags
from l1_jax.config.schema import Config
from l1_jax.console import EXIT_STOPPED, console
from l1_jax.errors import UserError


def train(
    config: Config,
    *,
    resume: bool = False,
    resume_from: str | None = None,
    overwrite: bool = False,
    allow_change: Collection[str] = (),
) -> int:
    """Trains as a config says; see `run.train.train`.

    The planner answers where `training.batch_size` is auto.
    """
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
    overrides, args = _parse(argv)
    _check(args)

    # A signal is heard before these imports, which take a while.
    from l1_jax.checkpoint import resuming
    from l1_jax.config.yaml_file import load_config
    from l1_jax.devices import processes
    from l1_jax.devices.select import make_deterministic
    from l1_jax.run import signals
    from l1_jax.run.watchdog import Watchdog
    from l1_jax.training.section import TrainingConfig

    resume = args.resume is not None
    resume_from = args.resume if isinstance(args.resume, str) else None

    # The config, if any, is not known yet: its default says how long to wait.
    with Watchdog(args.join_timeout + TrainingConfig.hang_timeout_seconds):
        processes.start(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
        with processes.together():
            config = load_config(args.config, overrides)

            # Else a copied config of a run may mean that run.
            is_directory_given = any(text.startswith("training.output_dir=") for text in overrides)
            if not is_directory_given:
                home = resuming.home_of(
                    Path(args.config),
                    config.training.output_dir,
                    resume=resume,
                    overwrite=args.overwrite,
                )
                config = config.replace("training", output_dir=home)

            if config.training.deterministic:
                # Before the processes talk to one another, which starts jax.
                make_deterministic()

    try:
        code = train(
            config,
            resume=resume,
            resume_from=resume_from,
            overwrite=args.overwrite,
            allow_change=args.allow_change,
        )
        if code == EXIT_STOPPED and processes.is_main():
            console.print("the same command with --resume goes on")

        return code
    finally:
        # Else `stop`, which is back, would end what has ended with 75.
        signals.ignore()


def _parse(argv: list[str]) -> tuple[list[str], argparse.Namespace]:
    """The overrides, and the flags."""
    parser = Parser(
        "Trains a language model on a prepared directory.", epilog="Keys: docs/configuration.md"
    )
    parser.add_path(
        "--config",
        required=True,
        metavar="FILE",
        help="YAML; keys that are not in it have defaults",
    )

    # A run that is there already.
    parser.add_path(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="PATH",
        help="go on with the run in training.output_dir, from its newest checkpoint or from PATH",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME",
        help="resume although this changed, as data or training.seed; may be repeated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the run in training.output_dir"
    )

    add_process_flags(parser)
    parser.add_argument("--local-rank", "--local_rank", help="refused: torchrun is not needed here")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="override keys of the config"
    )
    return parser.parse_overrides(argv)


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where flags are wrong; before anything is loaded."""
    set_by_torchrun = {"LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
    if args.local_rank is not None or set_by_torchrun <= os.environ.keys():
        what = (
            "torchrun and torch.distributed.launch start one process per GPU, and here one "
            "process uses them all"
        )
        raise UserError(what, f"Run python scripts/train.py --config {args.config}")

    if args.overrides:
        what = f"{args.overrides[0]!r} is no override"
        raise UserError(what, "Write section.key=value, as training.max_steps=100")

    if args.resume == "":
        raise UserError("--resume= is empty", "Give a path, or --resume alone")

    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other", "Give one of them")

    if args.allow_change and args.resume is None:
        what = "--allow-change is given without --resume"
        raise UserError(what, "It is for a run that goes on: give both")
