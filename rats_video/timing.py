"""Measures the phases of a step without waiting for the device."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

REST = "rest"

_RUNNING: ContextVar[Stopwatch | None] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Adds up what each `phase` takes, less the phases inside it; time outside of all of them is the `REST`.

    On CUDA the marks between phases are events in the stream, read once the device has passed them: nothing waits for
    it, and the result may lag a step behind.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._within = [REST]
        self._marks: deque[tuple[str, float | torch.cuda.Event]] = deque()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def start(self) -> None:
        """Count the phases of this thread from now on."""
        _RUNNING.set(self)
        self._mark()

    def stop(self) -> None:
        """Stop counting."""
        _RUNNING.set(None)

    def read(self) -> dict[str, float]:
        """Seconds by phase, since the start."""
        self._mark()
        while len(self._marks) > 1 and _is_passed(self._marks[1][1]):
            name, begun = self._marks.popleft()
            self._seconds[name] += _between(begun, self._marks[0][1])
        return dict(self._seconds)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Context whose time belongs to a phase."""
        self._within.append(name)
        self._mark()
        try:
            yield
        finally:
            self._within.pop()
            self._mark()

    def _mark(self) -> None:
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((self._within[-1], event))
        else:
            self._marks.append((self._within[-1], time.perf_counter()))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Context, or decorator, whose time the running stopwatch counts under this name; without one it does nothing."""
    stopwatch = _RUNNING.get()
    if stopwatch is None:
        yield
    else:
        with stopwatch.within(name):
            yield


def _is_passed(mark: float | torch.cuda.Event) -> bool:
    return isinstance(mark, float) or bool(mark.query())


def _between(first: float | torch.cuda.Event, last: float | torch.cuda.Event) -> float:
    if isinstance(first, float) or isinstance(last, float):
        return float(last) - float(first)  # type: ignore[arg-type]  # both are
    return float(first.elapsed_time(last)) / 1000
