"""Errors a user can mend. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from types import TracebackType

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that a terminal obeys or cannot show: control codes but tab and newline, direction marks, surrogates."""


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


class BusyError(UserError):
    """Another process works where this one would."""


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


class AsUserError(AbstractContextManager[None]):
    """Turns any exception of a library at a stranger's files into a `UserError` that ends with its message.

    Tokenizers raise a bare `Exception`; which others are raised depends on where a damaged value is first used.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self._what, self._where, self._fix = what, where, fix

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # Cut: how to load it all the same.
            reason = first_line(error).partition(" If you want to instead")[0]
            raise UserError(f"{self._what}: {reason}", where=self._where, fix=self._fix) from error


_WORDING: ContextVar[Callable[[str], str]] = ContextVar("wording", default=str)


@contextmanager
def worded(wording: Callable[[str], str]) -> Iterator[None]:
    """Inside it, `wording` says each warning in the words of the caller."""
    token = _WORDING.set(wording)
    try:
        yield
    finally:
        _WORDING.reset(token)


def warn(what: str, *, where: str = "") -> None:
    """Print a one-line warning on stderr; the work continues."""
    line = _WORDING.get()(f"warning: {where}: {what}" if where else f"warning: {what}")
    print(printable(line), file=sys.stderr)  # noqa: T201


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class name if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def printable(text: str) -> str:
    r"""`text` with each of its `CONTROLS` spelled out, as `\x1b`: a name from a stranger commands no terminal."""
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
