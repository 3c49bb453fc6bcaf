"""What all commands share: flags, exit codes, the console."""

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console

from l1_jax.errors import RunError, UserError

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75

# Everything meant for a person goes to stderr, so that stdout holds results alone.
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
log = logging.getLogger("l1_jax")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = isinstance(action.default, bool | list | None)
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, but its errors read like ours and defaults are shown in the help."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"Run {self.prog} --help to see every flag")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts `section.key=value` from the rest before argparse, so that a flag with an optional value swallows none."""
    overrides = [a for a in argv if re.fullmatch(r"\w+(\.\w+)+=.*", a, re.DOTALL)]
    return overrides, [a for a in argv if a not in overrides]


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        console.print("warning: " * is_warning + self.format(record), style="yellow" if is_warning else None)


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main(argv)` and exits with its code; a `UserError` becomes one line and code 2."""
    log.setLevel(logging.INFO)
    log.handlers[:] = [_ConsoleHandler()]
    log.propagate = False
    try:
        code = main(sys.argv[1:]) or EXIT_OK
        sys.stdout.flush()
    except UserError as error:
        code = EXIT_FAILURE if isinstance(error, RunError) else EXIT_USAGE
        print(*error.details, f"error: {error}", sep="\n", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stdout = None
        code = EXIT_OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_FAILURE
    sys.exit(code)
