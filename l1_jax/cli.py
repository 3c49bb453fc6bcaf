"""What all commands share: flags, exit codes, the console."""

import argparse
import atexit
import contextlib
import errno
import io
import itertools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from rich.console import Console

from l1_jax.errors import UserError
from l1_jax.files import expand_user_path
from l1_jax.interrupts import Interrupted, Interruptible

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 75


class _Tolerant:
    """A stream whose reader may leave, or whose terminal be closed: no run ends for that."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Console(Console):
    @property
    def file(self) -> Any:
        return _Tolerant(super().file)

    @file.setter
    def file(self, new: Any) -> None:
        self._file = new


# Everything meant for a person goes to stderr, so that stdout holds results alone.
console = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
log = logging.getLogger("l1_jax")
on_exit = contextlib.ExitStack()  # closed at the end of a command, whatever ends it
atexit.register(on_exit.close)


class Parser(argparse.ArgumentParser):
    """argparse, but its errors read like ours and defaults are shown in the help."""

    def __init__(self, description: str, **options):
        super().__init__(description=description, allow_abbrev=False, **options)

    def add_argument(self, *names, **options):
        if options.get("default") not in (None, argparse.SUPPRESS, []):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def add_path(self, *names, **options):
        """Adds a flag or a place whose value is a path, or several of them; see `expand_user_path`."""
        name = names[0] if names[0].startswith("-") else options["metavar"]
        return self.add_argument(*names, type=lambda text: expand_user_path(text, name), **options)

    def parse_overrides(self, argv: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
        """The parts `section.key=value` of a command line, and the rest of it, parsed.

        The value of a flag is no override, whatever it looks like. After a flag that may stand alone, as --resume may,
        it is an override unless there is a file or directory of that name.
        """
        overrides: list[str] = []
        rest: list[str] = []
        for before, argument in itertools.pairwise(["", *argv]):
            flag = self._option_string_actions.get(before)
            is_value = flag is not None and flag.nargs is None
            is_value |= flag is not None and flag.nargs == "?" and os.path.exists(os.path.expanduser(argument))

            looks_like_one = re.fullmatch(r"\w+(\.\w+)+=.*", argument, re.DOTALL)
            (overrides if looks_like_one and not is_value else rest).append(argument)
        return overrides, self.parse_args(rest)

    def error(self, message: str) -> NoReturn:
        raise UserError(message, f"Run {self.prog} --help to see every flag")


def add_device_flags(parser: Parser) -> None:
    """On what a command runs."""
    devices = ("auto", "cpu", "gpu", "cuda", "tpu")
    parser.add_argument("--device", default="auto", choices=devices, help="what to run on")
    parser.add_argument("--mesh", metavar="AXIS=N,...", help="how to use several devices, as in fsdp=4,tensor=2")


def add_process_flags(parser: Parser) -> None:
    """The flags by which several processes find one another where no cluster tells them."""
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    parser.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process-id", type=int, metavar="I", help="the number of this one, from 0")
    parser.add_argument(
        "--join-timeout", type=int, default=120, metavar="SECONDS", help="how long to wait for the others"
    )


# What is not a mistake of ours when something cannot be written.
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix, style = _LEVELS.get(record.levelno, ("", None))
        console.print(prefix + self.format(record), style=style)


def _escape_what_streams_cannot_take() -> None:
    """Has stdout and stderr escape a character that they cannot encode: an ASCII terminal, a file name that is no
    UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


leave: Callable[[int], NoReturn] = sys.exit  # one of several processes has another way to go


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs `main(argv)` and exits with its code; a `UserError` becomes one line and its code."""
    log.setLevel(logging.INFO)
    log.handlers[:] = [_ConsoleHandler()]
    log.propagate = False
    _escape_what_streams_cannot_take()
    try:
        with Interruptible(at_end=on_exit.close):
            code = main(sys.argv[1:]) or EXIT_OK
        if sys.stdout:  # None where the shell closed it
            sys.stdout.flush()
    except UserError as error:
        code = error.exit_code
        print(*error.details, f"error: {error}", sep="\n", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stdout = None
        code = EXIT_OK
    except OSError as error:
        code = EXIT_USAGE if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) else EXIT_FAILURE
        if code == EXIT_FAILURE and error.errno not in DISK_FAULTS:
            traceback.print_exc()
        if error.filename or error.errno in DISK_FAULTS:
            remedy = "Check the path and its permissions" if code == EXIT_USAGE else "Check the path and its disk"
            print(f"error: {error.filename or 'the disk'}: {error.strerror}. {remedy}.", file=sys.stderr)
    except Interrupted as error:
        print("interrupted", file=sys.stderr)
        code = error.code
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILURE
    on_exit.close()
    leave(code)
