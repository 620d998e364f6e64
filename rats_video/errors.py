"""Errors a user can mend. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import re
import sys

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What a terminal obeys or cannot show: control codes but tab and newline, changes of direction, surrogates."""


class UserError(Exception):
    """A mistake in what the user gave us: shown as one line, exit code 2, no traceback.

    Args:
        what: what is wrong, one clause ("nfe must be at least 1, got 0").
        where: the config key, option or file it is wrong in ("--nfe", "teacher.num_steps", a path).
        fix: how to mend it ("use 3, 4, 5 or 8").
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        line = f"{where}: {what}" if where else what
        super().__init__(printable(f"{line} ({fix})" if fix else line))


class Interrupted(Exception):  # noqa: N818  # no error: what was done is saved
    """The user asked a run to stop and it did, with everything saved; the message says how to go on."""


def warn(what: str, *, where: str = "") -> None:
    """Say on stderr, as one line, what may not be as the user expects; the work goes on."""
    line = f"warning: {where}: {what}" if where else f"warning: {what}"
    print(printable(line), file=sys.stderr)  # noqa: T201


def printable(text: str) -> str:
    r"""`text` with each of its `CONTROLS` spelled out, as `\x1b`: a name from a stranger commands no terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
