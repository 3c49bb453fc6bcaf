"""The errors that a user can cause. Each says what is wrong and how to mend it."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """Something outside the program is wrong: a file, a flag, a config value.

    The command line prints it as one line, `error: WHAT. HOW TO MEND IT.`, after `details` where a line cannot hold it
    all, and exits with 2. `what` names the value and the file; it and `remedy` end without a full stop. What would not
    stay on the line, or would steer the terminal, is escaped: a file may be called anything.
    """

    exit_code = 2

    def __init__(self, what: str, remedy: str, details: Sequence[str] = ()):
        text = f"{what}{'' if what.endswith('?') else '.'} {remedy}."
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in text))
        self.what, self.remedy, self.details = what, remedy, tuple(details)


class RunError(UserError):
    """A run could not go on, though its input was legal: numbers not finite, memory too small. The exit code is 1."""

    exit_code = 1


class BusyError(UserError):
    """Something is not to be had yet, and the same command may work later: another process has it, or has not come. The
    exit code is 75, EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or nothing: the end of a sentence about an unknown `name`."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_writable(directory: Path, flag: str) -> None:
    """Raises UserError where `directory`, given by `flag`, cannot be made or written to."""
    try:
        str(directory).encode()
    except UnicodeEncodeError:
        raise UserError(f"{flag} {directory} is no UTF-8, which libraries want", f"Set another {flag}") from None
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir() or not os.access(place, os.W_OK):
        what = f"{flag} {directory} cannot be written: {place} is not a directory that you may write to"
        raise UserError(what, f"Set another {flag}")
