"""Consistency distillation with an image reward and a video reward (T2V-Turbo, arXiv 2405.18750, section 3).

The loss is the consistency loss over the whole path, minus both rewards of the clip that the student predicts in a
single step from wherever the pair lies: no rollout is backpropagated through, and the rewards cost no further call of
the network. One guidance scale is distilled, the teacher's; the paper tells the student which.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rats_video.config.rivals import T2VTurboMethod
from rats_video.distill.consistency import path_loss
from rats_video.distill.finite import SKIPPED
from rats_video.distill.method import Players, Row, judged_clip
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class T2VTurbo(Players):
    """Loss = consistency - reward_weight * R(predicted clip).

    With a video reward, `reward` is `R_image + video_weight * R_video` (`build/reward.py`): one decode serves both.
    """

    method: T2VTurboMethod

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it; the rewards judge the first pair of each clip."""
        ends = self.student.sigmas(1, self.shift)
        loss, predicted = path_loss(self.student, self.teacher, batch, ends, self.method.pairs)
        row = {"consistency/loss": float(loss.detach()), SKIPPED: 0.0}
        if self.method.uses_gradient:
            scores, judged = judged_clip(self, batch, predicted, with_gradient=True)
            loss, row = loss - self.method.reward_weight * scores.clip.mean(), row | judged
        return loss, {"loss": float(loss.detach()), **row}
