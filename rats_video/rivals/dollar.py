"""Variational score and consistency distillation with a latent reward model (DOLLAR, arXiv 2412.15689).

Three terms in one loss, as we read its sections 3 and 4: variational score distillation, which is distribution matching
with a fake score (`distill/distribution.py`), on the clips of the student's own sampler; consistency along the
teacher's path, here in the segments that the sampler steps over (`distill/consistency.py`); and a reward of the same
clips that needs no decoder (`rewards/latent_reward.py`). The paper fine-tunes with the reward after distillation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rats_video.config.rivals import DollarMethod
from rats_video.distill.consistency import path_loss
from rats_video.distill.distribution import NAME, DistributionMatching
from rats_video.distill.draws import FAKE_SCORE, draw_noise
from rats_video.distill.method import Companion, Players, Row, judged_clip, student_path
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Dollar(Players):
    """Loss = score_weight * distribution matching + consistency_weight * consistency - reward_weight * R_student."""

    method: DollarMethod
    matching: DistributionMatching

    @property
    def companions(self) -> Mapping[str, Companion]:
        """The fake score; each of its rounds sees clips from noise of its own."""
        return {NAME: self.matching.companion(self._clips_from_new_noise)}

    def _clips_from_new_noise(self, batch: PromptBatch, index: int) -> Tensor:
        noise = draw_noise(batch, FAKE_SCORE, index, 2)
        return student_path(self, replace(batch, noise=noise), grad_steps=()).x0

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        method = self.method
        x0 = student_path(self, batch).x0
        scores, row = judged_clip(self, batch, x0, with_gradient=method.uses_gradient)
        matching = self.matching.loss(x0, batch).mean()
        ends = self.student.sigmas(batch.num_steps, self.shift)
        consistency, _ = path_loss(self.student, self.teacher, batch, ends, method.pairs)
        loss = method.score_weight * matching + method.consistency_weight * consistency
        loss = loss - method.reward_weight * scores.clip.mean()
        terms = {"loss": loss, "matching/loss": matching, "consistency/loss": consistency}
        return loss, {name: float(term.detach()) for name, term in terms.items()} | row
