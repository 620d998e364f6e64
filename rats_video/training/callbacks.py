"""Students on their way: weights that are kept after given steps, whatever becomes of the checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from rats_video.methods.base import LogRow, Method
from rats_video.runtime import Runtime
from rats_video.timing import phase
from rats_video.training.anchor import InitialWeights
from rats_video.training.checkpoint import Weights, save_weights
from rats_video.training.guard import Guard
from rats_video.training.run_folder import RunFolder


@dataclass(frozen=True)
class StudentSnapshots:
    """Keeps the student after each of `steps` in `run.milestone(step)`; a step that is done again is kept again.

    All processes have it, since they may have to bring parts of split weights together.
    """

    steps: Collection[int]
    student: Weights
    run: RunFolder
    runtime: Runtime

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Nothing: see `Callback`."""

    def on_step(self, step: int, row: LogRow) -> None:  # noqa: ARG002  # a Callback's
        """Keep it, if it is time."""
        if step in self.steps:
            save_weights(self.run.milestones, step, self.student, writes=self.runtime.is_main)

    def on_checkpoint(self) -> None:
        """Nothing: what is kept is on the disk already."""

    def on_end(self) -> None:
        """Nothing."""


class Callback(Protocol):
    """Looks on at a training, and changes nothing that is computed in it.

    One that does something together with other processes must be there on all of them.
    """

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Before the first step after a checkpoint of this state, `{"step": 0}` where there is none.

        It comes again, with an earlier one, when the run goes back.
        """
        ...

    def on_step(self, step: int, row: LogRow) -> None:
        """After each step, the first is 1; `row` is what is logged of it."""
        ...

    def on_checkpoint(self) -> None:
        """A checkpoint is about to be written: put on the disk what a run that goes on from it will not do again."""
        ...

    def on_end(self) -> None:
        """The training is over, by an error too; it may not even have begun."""
        ...


class CallbackList:
    """All of them, told in turn; a context at whose end each of them ends, even if another cannot."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = members

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ending:
            for each in reversed(self._members):
                ending.callback(each.on_end)

    def on_start(self, state: Mapping[str, Any]) -> None:
        """See `Callback.on_start`."""
        for each in self._members:
            each.on_start(state)

    def on_step(self, step: int, row: LogRow) -> None:
        """See `Callback.on_step`."""
        for each in self._members:
            each.on_step(step, row)

    def on_checkpoint(self) -> None:
        """See `Callback.on_checkpoint`."""
        for each in self._members:
            each.on_checkpoint()


@dataclass(frozen=True)
class GuardCallback:
    """The guard, if there is one."""

    guard: Guard | None
    anchor: InitialWeights | None
    method: Method
    steps: int
    runtime: Runtime

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Take up a checkpoint's record, and look at a student that was not looked at yet."""
        if self.guard is not None:
            if "guard" in state:
                self.guard.load_state(state["guard"])
            self.on_step(state["step"])

    def on_step(self, step: int) -> None:
        """Look, where a look is due."""
        if self.guard is not None and self.anchor is not None and self.guard.is_due(step, self.steps):
            with phase("guard"):
                self.guard.evaluate(self.method, step, self.anchor.drift(self.runtime))

    @property
    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {} if self.guard is None else {"guard": self.guard.record}

    @property
    def guided_method(self) -> Method:
        """The method, with its shaping as strong as the guard wants it."""
        return self.method if self.guard is None else self.method.with_shaping(self.guard.shaping)

    @property
    def stops(self) -> bool:
        """Whether the run is to end."""
        return self.guard is not None and self.guard.stops
