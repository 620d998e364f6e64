"""Ctrl-C, SIGTERM and SIGUSR1 stop a training after its current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import NoReturn, Self

from rats_video.errors import REQUEUE, Interrupted
from rats_video.runtime import ALONE, Runtime


class StopRequest:
    """Context in which the first of these signals only sets `requested`, and the second one interrupts at once.

    In a thread beside the main one, which alone may take signals, it never stops.
    """

    def __init__(self) -> None:
        self.code = 0  # exit code of the process; 0 while nobody has asked to stop
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """True once somebody has asked to stop."""
        return self.code > 0

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def end(self, what: str, runtime: Runtime = ALONE) -> NoReturn:
        """Stop as asked on any process; all call it together."""
        raise Interrupted(f"{what}; --resume goes on from there", max(runtime.gather(self.code)))

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        code = 130 if number == signal.SIGINT else REQUEUE
        if self.requested:
            raise Interrupted("stopped amid a step, which is lost; --resume goes on from the last checkpoint", code)
        self.code = code
