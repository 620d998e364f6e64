"""Trajectory-segmented consistency distillation with human feedback (Hyper-SD, arXiv 2404.13686).

Section 3.1: the noise axis is cut into segments, fewer ones stage after stage; in each the student learns to jump from
any point of the teacher's path to the segment's end. Here the last stage's segments are the intervals of the student's
own grid. Section 3.2: feedback of a reward on what the student makes, in the same loss rather than as an adapter that
is merged in later.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rats_video.config.rivals import ConsistencyMethod
from rats_video.distill.consistency import path_loss
from rats_video.distill.finite import SKIPPED
from rats_video.distill.method import Players, Row, judged_clip, student_path
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Consistency(Players):
    """Loss = mean over pairs of how far apart their points are sent - reward_weight * R_student.

    Args:
        method: its settings.
        num_batches: of the run, which the stages share equally.
    """

    method: ConsistencyMethod
    num_batches: int

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        method = self.method
        stage = min(batch.index * len(method.stages) // self.num_batches, len(method.stages) - 1)
        ends = self.student.sigmas(batch.num_steps * method.stages[stage], self.shift)
        loss, _ = path_loss(self.student, self.teacher, batch, ends, method.pairs)
        row = {"consistency/loss": float(loss.detach()), SKIPPED: 0.0}
        if method.uses_gradient:
            path = student_path(self, batch, grad_steps=(batch.num_steps - 1,))
            scores, judged = judged_clip(self, batch, path.x0, with_gradient=True)
            loss, row = loss - method.reward_weight * scores.clip.mean(), row | judged
        return loss, {"loss": float(loss.detach()), **row}
