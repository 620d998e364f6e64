"""Faulty steps: a run skips the step, rolls back with a lower learning rate, or stops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from rats_video.config.fields import Config, NonNegativeInt, PositiveFloat
from rats_video.errors import UserError, warn
from rats_video.files import remove
from rats_video.runtime import Runtime
from rats_video.training.checkpoint import list_checkpoints, steps_done


class FaultsConfig(Config):
    """A step whose loss, gradient or updated weights are not finite is left out; too many, and the run goes back.

    It goes back to the last checkpoint from which a step succeeded, and on from there at a lower learning rate: the
    batches are the same ones, so nothing else would make a difference. A run that keeps going back stops.
    """

    skip: NonNegativeInt = Field(3, description="steps in a row that are left out; one more, and the run goes back")
    skip_total: NonNegativeInt = Field(50, description="the same for steps left out in all")
    rollbacks: NonNegativeInt = Field(3, description="how often the run may go back before it stops")
    lower: float = Field(0.5, gt=0, lt=1, description="factor of the learning rate, for good, each time it goes back")
    max_norm: PositiveFloat | None = Field(
        None, description="a gradient with a larger norm, before it is clipped, is a fault too; null = any is clipped"
    )


SKIPPED_STEP, ROLLBACKS = "faults/skipped", "faults/rollbacks"
"""Names in the log: 1 for a skipped step, and the number of rollbacks so far."""


class StepFault(Exception):  # noqa: N818  # no error yet: the policy decides
    """A step whose result must not be used; all processes raise it alike.

    Args:
        what: the fault, e.g. "the loss is nan".
        in_weights: True if the update was made already: then it is too late to skip the step.
        where: the part of the configuration that may be the cause.
        fix: how to mend it.
    """

    def __init__(
        self,
        what: str,
        *,
        in_weights: bool = False,
        where: str = "distill",
        fix: str = "lower training.optimizer.lr or method.alpha, or --resume with other training.faults",
    ) -> None:
        super().__init__(what)
        self.in_weights, self.where, self.fix = in_weights, where, fix


class RollBack(Exception):  # noqa: N818
    """Too many faults: the run must continue from an earlier checkpoint.

    Args:
        fault: the last of them.
        step: its step, counted from 1.
        before: a checkpoint of fewer steps than this was followed by a step without fault.
    """

    def __init__(self, fault: StepFault, step: int, before: int) -> None:
        super().__init__(f"{fault} at step {step}")
        self.fault, self.before = fault, before


@dataclass(frozen=True)
class _Count:
    """The counts that the policy decides on; part of a checkpoint.

    Args:
        in_row: consecutive steps skipped up to now.
        total: all steps skipped up to now.
        rollbacks: how often the run rolled back.
        lr_scale: factor of the learning rate after these rollbacks.
    """

    in_row: int = 0
    total: int = 0
    rollbacks: int = 0
    lr_scale: float = 1.0


class FaultPolicy:
    """Counts faults and decides.

    Decisions depend only on the last checkpoint and the steps since. A run that is resumed after a rollback, but before
    it saved again, meets the same faults and rolls back to the same checkpoint.

    Args:
        cfg: the limits.
        runtime: the processes, which decide alike.
    """

    def __init__(self, cfg: FaultsConfig, runtime: Runtime) -> None:
        self._cfg, self._runtime, self._count = cfg, runtime, _Count()

    @property
    def lr_scale(self) -> float:
        """Factor of the learning rate after the rollbacks."""
        return self._count.lr_scale

    @property
    def rollbacks(self) -> int:
        """Number of rollbacks."""
        return self._count.rollbacks

    @property
    def state(self) -> dict[str, Any]:
        """The policy's part of a checkpoint's state."""
        return {"faults": asdict(self._count)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint's state; rollbacks since then still count."""
        saved = _Count(**state.get("faults", {}))
        if self._count.rollbacks > saved.rollbacks:
            saved = replace(saved, rollbacks=self._count.rollbacks, lr_scale=self._count.lr_scale)
        self._count = saved

    def passed(self, row: Mapping[str, float]) -> dict[str, float]:
        """The row to log for a step without fault."""
        self._count = replace(self._count, in_row=0)
        return {**row, SKIPPED_STEP: 0, ROLLBACKS: self.rollbacks}

    def skip_step(self, fault: StepFault, step: int) -> dict[str, float]:
        """The row to log for a skipped step.

        Raises:
            RollBack: the step cannot be skipped, or too many were skipped before it.
        """
        count = self._count
        if fault.in_weights:
            raise RollBack(fault, step + 1, before=step + 1)
        if count.in_row == self._cfg.skip or count.total == self._cfg.skip_total:
            raise RollBack(fault, step + 1, before=step - count.in_row)
        self._count = replace(count, in_row=count.in_row + 1, total=count.total + 1)
        warn(f"{fault} at step {step + 1}, which is left out", where=fault.where)
        return {SKIPPED_STEP: 1, ROLLBACKS: self.rollbacks}

    def roll_back(self, checkpoints: Path, back: RollBack) -> None:
        """Delete the checkpoints after the one to continue from, and lower the learning rate.

        Raises:
            UserError: the run has rolled back too often, or there is no such checkpoint; then none is deleted.
        """
        saved = list_checkpoints(checkpoints)
        good = self._runtime.broadcast([steps_done(path) for path in saved if steps_done(path) < back.before])
        if not good or self.rollbacks == self._cfg.rollbacks:
            kept = (
                f"gone back {self.rollbacks}x before, earlier checkpoints are kept"
                if good
                else "no checkpoint to go back to"
            )
            raise UserError(f"{back}; {kept}", where=back.fault.where, fix=back.fault.fix)
        if self._runtime.is_main:
            for path in reversed(saved[len(good) :]):
                remove(path)
        self._runtime.barrier()
        scale = self.lr_scale * self._cfg.lower
        self._count = replace(self._count, rollbacks=self.rollbacks + 1, lr_scale=scale)
        warn(f"{back}: back to step {good[-1]}, on at {scale:g} of the learning rate", where=back.fault.where)
