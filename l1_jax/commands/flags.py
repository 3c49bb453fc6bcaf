"""The flags that commands share."""

import argparse
import itertools
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from l1_jax.config.yaml_file import config_from_text
from l1_jax.errors import UserError, nearest
from l1_jax.parallel.section import MESH_AXES, ParallelismConfig
from l1_jax.storage.files import expand_user_path

# The settings of sampling.
SAMPLING_FLAGS = {
    "temperature": "--temperature",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repetition-penalty",
}

# The arguments that messages of the library name, and that a command gives as flags: by the same
# name, but for one. What else stands in backquotes may be a user's own text.
FLAGS = {
    "allow_change": "--allow-change",
    "batch_size": "--batch-size",
    "coordinator": "--coordinator",
    "device": "--device",
    "device_kind": "--device-kind",
    "devices": "--devices",
    "exact": "--exact",
    "join_timeout": "--join-timeout",
    "json": "--json",
    "logprobs": "--logprobs",
    "max_tokens": "--max-tokens",
    "model": "--model",
    "num_processes": "--num-processes",
    "output": "--output",
    "overwrite": "--overwrite",
    "process_id": "--process-id",
    "resume": "--resume",
    "resume_from": "--resume",
    "seed": "--seed",
    "documents": "--documents",
    "split": "--split",
    "stop": "--stop",
    "tokenizer": "--tokenizer",
    "train_ratio": "--train-ratio",
    "val_ratio": "--val-ratio",
    "vocab_size": "--vocab-size",
    "weights": "--weights",
} | SAMPLING_FLAGS

_OVERRIDE = re.compile(r"\w+(\.\w+)+=.*", re.DOTALL)
_AXIS_SIZE = re.compile(r"-1|[0-9]+")


def spell_flags(text: str) -> str:
    """A message of the library as a command says it: `` `num_samples` `` becomes --num-samples."""
    return re.sub(r"`([a-z_]+)`", lambda match: FLAGS.get(match[1], match[0]), text)


class Parser(argparse.ArgumentParser):
    """argparse, but its errors read like ours, and its help shows the defaults."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False, **options)

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, argparse.SUPPRESS, []):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def add_path(self, *names, **options):
        """Adds a flag or a place whose value is a path, or several; see `expand_user_path`."""
        name = names[0] if names[0].startswith("-") else options["metavar"]
        return self.add_argument(*names, type=lambda text: expand_user_path(text, name), **options)

    def parse_overrides(self, argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
        """The parts `section.key=value` of a command line, and the rest of it, parsed.

        The value of a flag is no override, whatever it looks like. After a flag that may stand
        alone, as --resume may, it is an override unless there is a file or directory of that name.
        """
        overrides: list[str] = []
        rest: list[str] = []

        for before, argument in itertools.pairwise(["", *argv]):
            looks_like_one = _OVERRIDE.fullmatch(argument) is not None
            if looks_like_one and not self._is_value(argument, before):
                overrides.append(argument)
            else:
                rest.append(argument)

        return overrides, self.parse_args(rest)

    def _is_value(self, argument: str, before: str) -> bool:
        """Whether an argument is the value of the flag before it."""
        flag = self._option_string_actions.get(before)
        if flag is None:
            return False

        may_stand_alone = flag.nargs == "?"
        if may_stand_alone:
            return os.path.exists(os.path.expanduser(argument))
        return flag.nargs is None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but a flag that there is not is said first, whatever else is wrong."""
        for argument in sys.argv[1:] if args is None else args:
            if argument == "--":
                break

            if argument.startswith("--"):
                self._check_known(argument)

        return super().parse_args(args, namespace)

    def _check_known(self, argument: str) -> None:
        known = self._option_string_actions
        flag = argument.partition("=")[0]
        if flag in known:
            return

        override = argument.removeprefix("--")
        if re.fullmatch(r"\w+(\.\w+)+=.*", override, re.DOTALL):
            raise UserError(f"{flag} is no flag", f"Write {override}, without the dashes")

        plain = flag.replace("_", "-")
        hint = f"; did you mean {plain!r}?" if plain in known else nearest(flag, list(known))
        self.error(f"{flag} is no flag{hint}")

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"Run {self.prog} --help to see every flag")


def add_model_flags(parser: Parser) -> None:
    """Adds the flags for which model a command uses."""
    parser.add_path(
        "--model",
        required=True,
        metavar="PATH",
        help="a checkpoint, or a run directory (its best model); or a URL",
    )
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        help="of a run with training.ema_decay: their average, which is the default, or the others",
    )


def add_device_flags(parser: Parser) -> None:
    """Adds the flags that say on what a command runs."""
    devices = ("auto", "cpu", "gpu", "cuda", "tpu")
    parser.add_argument("--device", default="auto", choices=devices, help="what to run on")
    parser.add_argument(
        "--mesh", metavar="AXIS=N,...", help="how to use several devices, as in fsdp=4,tensor=2"
    )


def add_process_flags(parser: Parser) -> None:
    """Adds the flags by which several processes find one another, if no cluster tells them."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others"
    )
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="how many processes there are"
    )
    parser.add_argument(
        "--process-id", type=int, metavar="I", help="the number of this one, from 0"
    )
    parser.add_argument(
        "--join-timeout",
        type=int,
        default=120,
        metavar="SECONDS",
        help="how long to wait for the others",
    )


def parse_mesh(text: str | None) -> ParallelismConfig:
    """The sizes of the mesh of a command line, as `fsdp=4,tensor=2`.

    The devices left over are `data`.

    Raises:
        UserError: it is not that.
    """
    sizes: dict[str, str] = {}
    for part in text.split(",") if text else []:
        name, _, size = part.strip().partition("=")
        is_axis = name in MESH_AXES
        is_legal = is_axis and name not in sizes and _AXIS_SIZE.fullmatch(size)

        if not is_legal:
            hint = ""
            if not is_axis:
                hint = nearest(name, MESH_AXES)
            elif name in sizes:
                hint = ", or comes twice"

            what = f"--mesh {text!r}: {part.strip()!r} is no AXIS=SIZE{hint}"
            remedy = f"Write it as in fsdp=4,tensor=2; the axes are {', '.join(MESH_AXES)}"
            raise UserError(what, remedy)
        sizes[name] = size

    # The schema checks the sizes, as those of a file.
    keys = ", ".join(f"{name}: {size}" for name, size in sizes.items())
    return config_from_text(f"parallelism: {{{keys}}}", "--mesh").parallelism
