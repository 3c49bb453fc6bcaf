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

# Where a command has none of its own.
_MEMORY_REMEDY = "Use a machine with more memory"

# Errors that a path of the user causes, and not the disk.
_PATH_FAULTS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)

# The prefix and the colour of a line of the log.
_LEVELS = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "red")}


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix, style = _LEVELS.get(record.levelno, ("", None))
        console.print(prefix + spell_flags(self.format(record)), style=style)


def _escape_what_streams_cannot_take() -> None:
    """Has stdout and stderr escape a character that they cannot encode.

    An ASCII terminal cannot, nor can any stream a file name that is no UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_command(
    main: Callable[[list[str]], int | None], memory_remedy: str = _MEMORY_REMEDY
) -> NoReturn:
    """Runs a command and exits with its code; a `UserError` becomes one line and its code.

    Args:
        main: takes the arguments of the command line; None is `EXIT_OK`.
        memory_remedy: says what to lower where memory runs out.
    """
    log.setLevel(logging.INFO)
    log.handlers[:] = [_ConsoleHandler()]
    log.propagate = False
    _escape_what_streams_cannot_take()

    try:
        with Interruptible(at_end=on_exit.close), memory_errors(memory_remedy):
            code = main(sys.argv[1:]) or EXIT_OK

        # None where the shell closed it.
        if sys.stdout:
            sys.stdout.flush()
    except UserError as error:
        code = error.exit_code
        lines = [*error.details, f"error: {error}"]
        print(*map(spell_flags, lines), sep="\n", file=sys.stderr)
    except BrokenPipeError:
        # The reader of our output left, as `| head` does.
        sys.stdout = None
        code = EXIT_OK
    except OSError as error:
        code = _report_os_error(error)
    except Interrupted as error:
        print("interrupted", file=sys.stderr)
        code = error.code
    except Exception:
        traceback.print_exc()
        code = EXIT_FAILURE

    on_exit.close()

    # Looked up now: one of several processes has another way to go.
    terminal.leave(code)


def _report_os_error(error: OSError) -> int:
    """Says what could not be read or written, and returns the exit code."""
    is_path_fault = error.errno in _PATH_FAULTS
    is_disk_fault = error.errno in DISK_FAULTS

    # Neither the path nor the disk: perhaps a mistake of ours.
    if not is_path_fault and not is_disk_fault:
        traceback.print_exc()

    if error.filename or is_disk_fault:
        place = error.filename or "the disk"
        remedy = "Check the path and its disk"
        if is_path_fault:
            remedy = "Check the path and its permissions"
        print(f"error: {place}: {error.strerror}. {remedy}.", file=sys.stderr)

    return EXIT_USAGE if is_path_fault else EXIT_FAILURE


def run(name: str) -> NoReturn:
    """Runs the command of a module beside this one, and exits with its code."""
    command = importlib.import_module(f"l1_jax.commands.{name}")
    remedy = getattr(command, "MEMORY_REMEDY", _MEMORY_REMEDY)
    run_command(command.main, remedy)
