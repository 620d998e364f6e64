"""Consistency distillation with an image reward and a video reward (T2V-Turbo, arXiv 2405.18750, section 3).

The loss is the consistency loss over the whole path, minus both rewards of the clip that the student predicts in a
single step from wherever the pair lies: no rollout is backpropagated through, and the rewards cost no further call of
the network. One guidance scale is distilled, the teacher's; the paper tells the student which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat, PositiveFloat
from rats_video.methods.base import BaseMethod, LogRow
from rats_video.methods.consistency_loss import BaseConsistencyConfig, trajectory_consistency_loss
from rats_video.methods.context import MethodContext
from rats_video.methods.finite import SKIPPED
from rats_video.methods.student import score_student_clip
from rats_video.rewards.reward import RewardConfig
from rats_video.types import PromptBatch


class T2VTurboConfig(BaseConsistencyConfig):
    """Loss = consistency with the clip - reward_weight * (R + video_weight * R_video) of the clip that is predicted.

    R is the run's reward, in the paper one that scores frames; both score what the student predicts in one step.
    """

    kind: Literal["t2v_turbo"]
    reward_weight: NonNegativeFloat = Field(1.0, description="of both rewards in the loss")
    video_reward: RewardConfig | None = Field(None, description="judges the same clips; null = none")
    video_weight: PositiveFloat = Field(1.0, description="of `video_reward` beside the run's reward")

    @property
    def further_rewards(self) -> Mapping[str, tuple[RewardConfig, float]]:
        """The video reward."""
        return {} if self.video_reward is None else {"video": (self.video_reward, self.video_weight)}

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The pairs; the rewards score what the student predicts there."""
        return self.pairs.evaluations(teacher, guided)

    def build(self, context: MethodContext) -> T2VTurbo:
        """The method on the run's roles."""
        return T2VTurbo(**context.inputs(), config=self)


@dataclass(frozen=True, kw_only=True)
class T2VTurbo(BaseMethod):
    """Loss = consistency - reward_weight * R(predicted clip).

    With a video reward, `reward` is `R_image + video_weight * R_video` (`rewards/reward.py`): one decode serves both.
    """

    config: T2VTurboConfig

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it; the rewards score the first pair of each clip."""
        ends = self.student.sigmas(1, self.shift)
        loss, predicted = trajectory_consistency_loss(self.student, self.teacher, batch, ends, self.config.pairs)
        row = {"consistency/loss": float(loss.detach()), SKIPPED: 0.0}
        if self.config.uses_gradient:
            scores, scored = score_student_clip(self, batch, predicted, with_gradient=True)
            loss, row = loss - self.config.reward_weight * scores.clip.mean(), row | scored
        return loss, {"loss": float(loss.detach()), **row}
