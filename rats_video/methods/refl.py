"""Reward feedback alone, backpropagated through the last steps of the student's rollout.

ReFL (ImageReward, arXiv 2304.05977, algorithm 1) takes one late step, DRaFT-K (arXiv 2309.17400, section 4.2) the last
K; VADER (arXiv 2407.08737) does so for video. What comes before runs without gradient: truncated backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from rats_video.config.fields import PositiveFloat, PositiveInt
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, BaseMethodConfig, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.student import score_student_clip, student_rollout
from rats_video.types import PromptBatch


class ReflConfig(BaseMethodConfig):
    """Loss = -R_student, backpropagated through the last steps of the rollout alone (ReFL, DRaFT-K)."""

    kind: Literal["refl"]
    last_steps: PositiveInt = Field(1, description="K: steps of the rollout, the last ones, that carry gradient")
    reward_weight: PositiveFloat = Field(1.0, description="of the reward in the loss")

    @property
    def uses_gradient(self) -> bool:
        """True: it is the loss."""
        return True

    @property
    def needs_euler(self) -> None:
        """Nothing: any rollout has last steps."""
        return

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The student's rollout, with gradient in its last steps."""
        return num_steps + (WITH_GRADIENT - 1) * min(self.last_steps, num_steps)

    def build(self, context: MethodContext) -> Refl:
        """The method on the run's roles."""
        return Refl(**context.inputs(), config=self)


@dataclass(frozen=True, kw_only=True)
class Refl(BaseMethod):
    """Loss = -reward_weight * R_student."""

    config: ReflConfig

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        last = range(max(0, batch.num_steps - self.config.last_steps), batch.num_steps)
        path = student_rollout(self, batch, grad_steps=last)
        scores, row = score_student_clip(self, batch, path.x0, with_gradient=True)
        loss = -self.config.reward_weight * scores.clip.mean()
        return loss, {"loss": float(loss.detach()), **row}
