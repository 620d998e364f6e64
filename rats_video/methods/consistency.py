"""Trajectory-segmented consistency distillation with human feedback (Hyper-SD, arXiv 2404.13686).

Section 3.1: the noise axis is cut into segments, fewer ones stage after stage; in each the student learns to jump from
any point of the teacher's path to the segment's end. Here the last stage's segments are the intervals of the student's
own grid. Section 3.2: feedback of a reward on what the student makes, in the same loss rather than as an adapter that
is merged in later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat, PositiveInt
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, LogRow
from rats_video.methods.consistency_loss import BaseConsistencyConfig, trajectory_consistency_loss
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import SKIPPED
from rats_video.methods.student import score_student_clip, student_rollout
from rats_video.types import PromptBatch


class ConsistencyConfig(BaseConsistencyConfig):
    """Loss = consistency of the student's steps along the teacher's path - reward_weight * R_student (Hyper-SD)."""

    kind: Literal["consistency"]
    stages: tuple[PositiveInt, ...] = Field(
        (1,), min_length=1,
        description="in how many segments each of the student's intervals is cut, one equal share of the run after "
        "the other; the last is 1",
    )  # fmt: skip
    reward_weight: NonNegativeFloat = Field(0.0, description="of the reward, by the last step of the rollout; 0 = off")

    @field_validator("stages")
    @classmethod
    def _ends_with_the_steps_of_inference(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        if stages[-1] != 1:
            raise ValueError(f"the last of the stages {list(stages)} must be 1: the student's own steps")
        return stages

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The pairs; the reward's rollout has gradient in its last step."""
        return self.pairs.evaluations(teacher, guided) + self.uses_gradient * (num_steps + WITH_GRADIENT - 1)

    def build(self, context: MethodContext) -> Consistency:
        """The method on the run's roles."""
        return Consistency(**context.inputs(), config=self, num_batches=context.num_batches)


@dataclass(frozen=True, kw_only=True)
class Consistency(BaseMethod):
    """Loss = mean over pairs of how far apart their points are sent - reward_weight * R_student.

    Args:
        config: its settings.
        num_batches: of the run, which the stages share equally.
    """

    config: ConsistencyConfig
    num_batches: int

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        method = self.config
        stage = min(batch.index * len(method.stages) // self.num_batches, len(method.stages) - 1)
        ends = self.student.sigmas(batch.num_steps * method.stages[stage], self.shift)
        loss, _ = trajectory_consistency_loss(self.student, self.teacher, batch, ends, method.pairs)
        row = {"consistency/loss": float(loss.detach()), SKIPPED: 0.0}
        if method.uses_gradient:
            path = student_rollout(self, batch, grad_steps=(batch.num_steps - 1,))
            scores, scored = score_student_clip(self, batch, path.x0, with_gradient=True)
            loss, row = loss - method.reward_weight * scores.clip.mean(), row | scored
        return loss, {"loss": float(loss.detach()), **row}
