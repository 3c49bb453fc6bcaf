"""The errors that a user can cause. Each says what is wrong and how to mend it."""

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path


class UserError(Exception):
    """Something outside the program is wrong: a file, a flag, a config value.

    The command line prints it as one line, `error: WHAT. HOW TO MEND IT.`, and exits with 2. What
    would not stay on the line, or would steer the terminal, is escaped: a file may be called
    anything.

    An argument is named in backquotes, as `overwrite`: a command spells it as its flag.

    Args:
        what: names the value and the file. It and `remedy` end without a full stop.
        remedy: how to mend it.
        details: lines that a command prints before, and a traceback after it, where one line cannot
            hold it all.
    """

    exit_code = 2

    def __init__(self, what: str, remedy: str, details: Sequence[str] = ()):
        stop = "" if what.endswith("?") else "."
        super().__init__(_escape(f"{what}{stop} {remedy}."))
        self.what = what
        self.remedy = remedy
        self.details = tuple(details)

        for line in self.details:
            self.add_note(line)


class RunError(UserError):
    """A run could not go on, though its input was legal. The exit code is 1.

    Numbers were not finite, for example, or the memory was too small.
    """

    exit_code = 1


class BusyError(UserError):
    """Something is not to be had yet, and the same command may work later.

    Another process has it, or has not come. The exit code is 75, EX_TEMPFAIL of sysexits.h.
    """

    exit_code = 75


def _escape(text: str) -> str:
    """The text with every character that cannot be printed as Python spells it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


# What jax and XLA say of it; numpy and Python have a type for it.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|unable to allocate", re.IGNORECASE
)


def memory_shortage(error: Exception) -> str | None:
    """That memory ran out, as the `what` of a UserError; None where it did not."""
    text = str(error).strip().partition("\n")[0]
    said = f" ({text})" if text else ""
    if isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    ):
        return f"this machine has too little memory{said}"

    # Not by jax's own type of error, for this module does without jax.
    if isinstance(error, RuntimeError | ValueError) and _OUT_OF_MEMORY.search(text):
        return f"the device has too little memory{said}"
    return None


@contextlib.contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Has what jax, numpy or Python raise where memory ran out end as a RunError."""
    try:
        yield
    except Exception as error:
        if what := memory_shortage(error):
            raise RunError(what, remedy) from error
        raise


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing: the end of a sentence about an unknown `name`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_writable(directory: Path, flag: str) -> None:
    """Checks that a directory can be made and written to.

    Args:
        directory: need not be there yet.
        flag: by which the user gave it.

    Raises:
        UserError: it cannot.
    """
    remedy = f"Set another {flag}"
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        what = f"{flag} {directory} is no UTF-8, which libraries want"
        raise UserError(what, remedy) from None

    # What is there already decides. A link that leads nowhere is there, and cannot be written to.
    candidates = (directory, *directory.absolute().parents)
    place = next(path for path in candidates if path.exists() or path.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = (
            f"{flag} {directory} cannot be written: "
            f"{place} is not a directory that you may write to"
        )
        raise UserError(what, remedy)
