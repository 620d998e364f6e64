"""Live progress: a rich bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_EVERY_SECONDS = 15.0


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; hours only where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
        self._console = Console(file=sys.stderr)
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
        left = (now - self._began) / max(1, self._done - self._start) * (self._total - self._done)
        text = "  ".join(f"{name} {value:.3g}" for name, value in info.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, left=format_seconds(left), info=text)
        elif now - self._last_line > _PLAIN_EVERY_SECONDS or self._done == self._total:
            self._last_line = now
            line = f"{self._title} {self._done}/{self._total}  left {format_seconds(left)}  {text}"
            self._console.print(line.rstrip(), highlight=False, soft_wrap=True)
