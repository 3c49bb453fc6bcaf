"""Runs a command: what it ends with, and what a person reads then."""

import errno
import importlib
import io
import logging
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from l1_jax import console as terminal
from l1_jax.commands.flags import spell_flags
from l1_jax.commands.interrupts import Interrupted, Interruptible
from l1_jax.console import DISK_FAULTS, EXIT_FAILURE, EXIT_OK, EXIT_USAGE, console, log, on_exit
from l1_jax.errors import UserError, memory_errors

_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix, style = _LEVELS.get(record.levelno, ("", None))
        console.print(prefix + spell_flags(self.format(record)), style=style)


def _escape_what_streams_cannot_take() -> None:
    """Has stdout and stderr escape a character that they cannot encode: an ASCII terminal, a file
    name that is no UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(
    main: Callable[[list[str]], int | None], memory_remedy: str = "Use a machine with more memory"
) -> NoReturn:
    """Runs `main(argv)` and exits with its code; a `UserError` becomes one line and its code.

    `memory_remedy` says what to lower where memory runs out.
    """
    log.setLevel(logging.INFO)
    log.handlers[:] = [_ConsoleHandler()]
    log.propagate = False
    _escape_what_streams_cannot_take()
    try:
        with Interruptible(at_end=on_exit.close), memory_errors(memory_remedy):
            code = main(sys.argv[1:]) or EXIT_OK
        if sys.stdout:  # None where the shell closed it
            sys.stdout.flush()
    except UserError as error:
        code = error.exit_code
        lines = [*error.details, f"error: {error}"]
        print(*map(spell_flags, lines), sep="\n", file=sys.stderr)
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        sys.stdout = None
        code = EXIT_OK
    except OSError as error:
        code = (
            EXIT_USAGE
            if error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
            else EXIT_FAILURE
        )
        if code == EXIT_FAILURE and error.errno not in DISK_FAULTS:
            traceback.print_exc()
        if error.filename or error.errno in DISK_FAULTS:
            remedy = (
                "Check the path and its permissions"
                if code == EXIT_USAGE
                else "Check the path and its disk"
            )
            print(
                f"error: {error.filename or 'the disk'}: {error.strerror}. {remedy}.",
                file=sys.stderr,
            )
    except Interrupted as error:
        print("interrupted", file=sys.stderr)
        code = error.code
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILURE
    on_exit.close()
    terminal.leave(code)  # looked up now: one of several processes has another way to go


def run(name: str) -> NoReturn:
    """Runs the command of a module beside this one, and exits with its code."""
    command = importlib.import_module(f"l1_jax.commands.{name}")
    remedy = getattr(command, "MEMORY_REMEDY", None)
    run_command(command.main, **({"memory_remedy": remedy} if remedy else {}))
