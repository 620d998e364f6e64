"""Live progress: a rich bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_EVERY_SECONDS = 15.0

SecondsLater = Callable[[], float | None]
_LATER: ContextVar[tuple[SecondsLater, ...]] = ContextVar("later", default=())


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; hours only where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def followed_by(later: SecondsLater) -> Iterator[None]:
    """Bars that begin inside it also tell the time left in all.

    Args:
        later: gives the seconds of the work after this one; None while nobody knows.
    """
    token = _LATER.set((*_LATER.get(), later))
    try:
        yield
    finally:
        _LATER.reset(token)


def left_teller() -> Callable[[float], str]:
    """A function that tells the seconds left of one piece of work, as `1:15`, and what is left in all.

    Inside `followed_by`: `1:15, 4:40 in all`, or `1:15 of this stage` while the rest is unknown. Ask for it where the
    work begins: the thread that redraws a terminal sees no context variables.
    """
    after = _LATER.get()

    def tell(seconds: float) -> str:
        told, later = format_seconds(seconds), 0.0
        for seconds_of in after:
            known = seconds_of()
            if known is None:
                return f"{told} of this stage"
            later += known
        return f"{told}, {format_seconds(seconds + later)} in all" if after else told

    return tell


class ProgressBar:
    """Counts `total` steps of one piece of work; the time left is elapsed time a finished step, times those to come.

    Args:
        title: what is being done.
        total: steps in all.
        start: steps already done (a resumed run); they do not count towards the speed.
    """

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self._title, self._total, self._start, self._done = title, total, start, start
        self._began = self._last_line = time.monotonic()
        self._tell_left = left_teller()
        # Plain lines in a notebook, which claims to be a terminal that takes colours.
        self._console = Console(file=sys.stderr, force_jupyter=False, force_terminal=sys.stderr.isatty())
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:<22}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left {task.fields[left]:>7}"),
                TextColumn("[dim]{task.fields[info]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, completed=self._start, left="?", info="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, steps: int = 1, /, **info: float) -> None:
        """`steps` more are done; `info` are figures to show beside the bar."""
        self._done += steps
        now = time.monotonic()
        left = self._tell_left(self._seconds_left(now))
        text = "  ".join(f"{name} {value:.3g}" for name, value in info.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=left, info=text)
        elif now - self._last_line > _PLAIN_EVERY_SECONDS or self._done == self._total:
            self._last_line = now
            line = f"{self._title} {self._done}/{self._total}  left {left}  {text}"
            self._console.print(line.rstrip(), highlight=False, soft_wrap=True)

    def _seconds_left(self, now: float) -> float:
        return (now - self._began) / max(1, self._done - self._start) * (self._total - self._done)


@dataclass
class Pace:
    """The seconds that clips take, measured on those made: in a clip's network calls, and beside them.

    The two are told apart because samplers of a few calls and of a hundred take turns, and decoding and scoring a clip
    take as long after either.
    """

    calls: int = 0
    clips: int = 0
    in_calls: float = 0.0
    beside: float = 0.0

    def add(self, calls: int, clips: int, in_calls: float, beside: float) -> None:
        """Count clips that were made, with their network calls and seconds."""
        self.calls += calls
        self.clips += clips
        self.in_calls += in_calls
        self.beside += beside

    def seconds(self, calls: int, clips: int) -> float:
        """The seconds that so many clips, with so many network calls in all, will take."""
        return calls * self.in_calls / max(1, self.calls) + clips * self.beside / max(1, self.clips)


class ClipBar(ProgressBar):
    """Counts clips of several samplers; the time left is that of their calls, and of what comes beside them.

    Args:
        title: what is being done.
        calls: network calls in all, of one clip each.
        clips: clips in all.
        pace: measured before, and goes on to be; None begins one.
    """

    def __init__(self, title: str, calls: int, clips: int, pace: Pace | None = None) -> None:
        super().__init__(title, clips)
        self._calls, self._last = calls, time.monotonic()
        self._pace = Pace() if pace is None else pace

    def made(self, calls: int, clips: int, in_calls: float) -> None:
        """`clips` more are done, with `calls` network calls in all that took `in_calls` seconds."""
        now = time.monotonic()
        self._pace.add(calls, clips, in_calls, max(0.0, now - self._last - in_calls))
        self._calls, self._last = self._calls - calls, now
        self.advance(clips)

    def _seconds_left(self, now: float) -> float:  # noqa: ARG002  # it is in the pace
        return self._pace.seconds(self._calls, self._total - self._done)
