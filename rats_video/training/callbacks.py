"""Callbacks of the training loop: their base class, the list of them, the guard's, and snapshots of the student."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rats_video.methods.base import LogRow, Method
from rats_video.runtime import Runtime
from rats_video.timing import phase
from rats_video.training.anchor import InitialWeights
from rats_video.training.checkpoint import Weights, save_weights
from rats_video.training.guard import Guard
from rats_video.training.run_folder import RunFolder


class Callback:
    """Observes a training, and changes nothing that is computed in it; by default it does nothing.

    A callback that works together with other processes must exist on all of them.
    """

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Called before the first step, with the state of the checkpoint it starts from (`{"step": 0}` without one).

        Called again, with an earlier state, when the run rolls back.
        """

    def on_step(self, step: int, row: LogRow) -> None:
        """Called after each step, the first is 1; `row` is what is logged of it."""

    def on_checkpoint(self) -> None:
        """Called before a checkpoint. Flush everything that a resumed run will not produce again."""

    def on_end(self) -> None:
        """Called when the training ends, also by an error, even if it never began."""


class StepCallback(Callback):
    """Tells a function of each step: its number, the first is 1, and what is logged of it."""

    def __init__(self, function: Callable[[int, LogRow], None]) -> None:
        self._function = function

    def on_step(self, step: int, row: LogRow) -> None:
        """See `Callback`."""
        self._function(step, row)


class CallbackList:
    """Calls all callbacks in order. A context: at its end each of them ends, even if another one fails to."""

    def __init__(self, members: Sequence[Callback]) -> None:
        self._members = members

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for callback in reversed(self._members):
                stack.callback(callback.on_end)

    def on_start(self, state: Mapping[str, Any]) -> None:
        """See `Callback.on_start`."""
        for callback in self._members:
            callback.on_start(state)

    def on_step(self, step: int, row: LogRow) -> None:
        """See `Callback.on_step`."""
        for callback in self._members:
            callback.on_step(step, row)

    def on_checkpoint(self) -> None:
        """See `Callback.on_checkpoint`."""
        for callback in self._members:
            callback.on_checkpoint()


@dataclass(frozen=True)
class GuardCallback:
    """Runs the guard, if there is one."""

    guard: Guard | None
    anchor: InitialWeights | None
    method: Method
    steps: int
    runtime: Runtime

    def on_start(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's record, and evaluate its student if that is due and not done yet."""
        if self.guard is not None:
            if "guard" in state:
                self.guard.load_state(state["guard"])
            self.on_step(state["step"])

    def on_step(self, step: int) -> None:
        """Evaluate the student, if it is due."""
        if self.guard is not None and self.anchor is not None and self.guard.is_due(step, self.steps):
            with phase("guard"):
                self.guard.evaluate(self.method, step, self.anchor.drift(self.runtime))

    @property
    def state(self) -> dict[str, Any]:
        """The guard's part of a checkpoint's state."""
        return {} if self.guard is None else {"guard": self.guard.record}

    @property
    def guided_method(self) -> Method:
        """The method, with its shaping as strong as the guard wants it."""
        return self.method if self.guard is None else self.method.with_shaping(self.guard.shaping)

    @property
    def stops(self) -> bool:
        """True if the guard ends the run."""
        return self.guard is not None and self.guard.stops


@dataclass(frozen=True)
class StudentSnapshots(Callback):
    """Saves the student after each of `steps` in `run.milestone(step)`, whatever becomes of the checkpoints.

    A step that is done again is saved again. All processes have this callback, since each holds shards of
    split weights.
    """

    steps: Collection[int]
    student: Weights
    run: RunFolder
    runtime: Runtime

    def on_step(self, step: int, row: LogRow) -> None:  # noqa: ARG002  # a Callback's
        """Save the student, if it is time."""
        if step in self.steps:
            save_weights(self.run.milestones, step, self.student, self.runtime)
