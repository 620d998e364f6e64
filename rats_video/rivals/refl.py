"""Reward feedback alone, backpropagated through the last steps of the student's rollout.

ReFL (ImageReward, arXiv 2304.05977, algorithm 1) takes one late step, DRaFT-K (arXiv 2309.17400, section 4.2) the last
K; VADER (arXiv 2407.08737) does so for video. What comes before runs without gradient: truncated backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rats_video.config.method import ReflMethod
from rats_video.distill.method import Players, Row, judged_clip, student_path
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Refl(Players):
    """Loss = -reward_weight * R_student."""

    method: ReflMethod

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        last = range(max(0, batch.num_steps - self.method.last_steps), batch.num_steps)
        path = student_path(self, batch, grad_steps=last)
        scores, row = judged_clip(self, batch, path.x0, with_gradient=True)
        loss = -self.method.reward_weight * scores.clip.mean()
        return loss, {"loss": float(loss.detach()), **row}
