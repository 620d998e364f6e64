"""Students on their way: weights that are kept after given steps, whatever becomes of the checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rats_video.distill.method import Row
from rats_video.runtime import Runtime
from rats_video.training.checkpoint import Weights, save_weights
from rats_video.training.run_folder import RunFolder


@dataclass(frozen=True)
class Milestones:
    """Keeps the student after each of `steps` in `run.milestone(step)`; a step that is done again is kept again.

    All processes have it, since they may have to bring parts of split weights together.
    """

    steps: Collection[int]
    student: Weights
    run: RunFolder
    runtime: Runtime

    def begin(self, state: Mapping[str, Any]) -> None:
        """Nothing: see `Observer`."""

    def after(self, step: int, row: Row) -> None:  # noqa: ARG002  # an Observer's
        """Keep it, if it is time."""
        if step in self.steps:
            save_weights(self.run.milestones, step, self.student, writes=self.runtime.is_main)

    def settle(self) -> None:
        """Nothing: what is kept is on the disk already."""

    def end(self) -> None:
        """Nothing."""
