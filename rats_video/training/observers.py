"""Who looks on at a training; and the guard, which may also steer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Protocol, Self

from rats_video.distill.method import Method, Row
from rats_video.distill.step import Rats
from rats_video.runtime import Runtime
from rats_video.timing import phase
from rats_video.training.anchor import Anchor
from rats_video.training.guard import Guard


class Observer(Protocol):
    """Looks on at a training, and changes nothing that is computed in it.

    One that does something together with other processes must be there on all of them.
    """

    def begin(self, state: Mapping[str, Any]) -> None:
        """Before the first step after a checkpoint of this state, `{"step": 0}` where there is none.

        It comes again, with an earlier one, when the run goes back.
        """
        ...

    def after(self, step: int, row: Row) -> None:
        """After each step, the first is 1; `row` is what is logged of it."""
        ...

    def settle(self) -> None:
        """A checkpoint is about to be written: put on the disk what a run that goes on from it will not do again."""
        ...

    def end(self) -> None:
        """The training is over, by an error too; it may not even have begun."""
        ...


class Observers:
    """All of them, told in turn; a context at whose end each of them ends, even if another cannot."""

    def __init__(self, members: Sequence[Observer]) -> None:
        self._members = members

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ending:
            for each in reversed(self._members):
                ending.callback(each.end)

    def begin(self, state: Mapping[str, Any]) -> None:
        """See `Observer.begin`."""
        for each in self._members:
            each.begin(state)

    def after(self, step: int, row: Row) -> None:
        """See `Observer.after`."""
        for each in self._members:
            each.after(step, row)

    def settle(self) -> None:
        """See `Observer.settle`."""
        for each in self._members:
            each.settle()


@dataclass(frozen=True)
class GuardWatch:
    """The guard, if there is one."""

    guard: Guard | None
    anchor: Anchor | None
    method: Method
    steps: int
    runtime: Runtime

    def begin(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's record, and look at a student that was not looked at yet."""
        if self.guard is not None:
            if "guard" in state:
                self.guard.recall(state["guard"])
            self.after(state["step"])

    def after(self, step: int) -> None:
        """Look, where a look is due."""
        if self.guard is not None and self.anchor is not None and self.guard.is_due(step, self.steps):
            with phase("guard"):
                self.guard.look(self.method, step, self.anchor.drift(self.runtime))

    @property
    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {} if self.guard is None else {"guard": self.guard.record}

    @property
    def guided(self) -> Method:
        """The method; RATS with its shaping as strong as the guard wants it."""
        if self.guard is None or not isinstance(self.method, Rats):
            return self.method
        return replace(self.method, shaping_strength=self.guard.shaping)

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.guard is not None and self.guard.stops
