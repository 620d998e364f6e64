"""Errors a user can mend. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import sys


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
        super().__init__(f"{line} ({fix})" if fix else line)


REQUEUE = 75
"""Exit code of a run that was asked to stop by SIGTERM or SIGUSR1 (EX_TEMPFAIL): a scheduler may start it again."""


class Interrupted(BaseException):  # no error, and no library's `except Exception` may swallow it
    """A run was asked to stop and did, with nothing lost; the message says how to go on.

    Args:
        what: the line to show.
        code: the exit code: 130 after Ctrl-C, else `REQUEUE`.
    """

    def __init__(self, what: str, code: int = 130) -> None:
        self.code = code
        super().__init__(what)


def warn(what: str, *, where: str = "") -> None:
    """Say on stderr, as one line, what may not be as the user expects; the work goes on."""
    print(f"warning: {where}: {what}" if where else f"warning: {what}", file=sys.stderr)  # noqa: T201
