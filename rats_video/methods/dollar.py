"""Variational score and consistency distillation with a latent reward model (DOLLAR, arXiv 2412.15689).

Three terms in one loss, as we read its sections 3 and 4: variational score distillation, which is distribution matching
with a fake score (`methods/distribution_matching.py`), on the clips of the student's own sampler; consistency along the
teacher's path, here in the segments that the sampler steps over (`methods/consistency_loss.py`); and a reward of the
same clips that needs no decoder (`rewards/latent.py`). The paper fine-tunes with the reward after distillation:
`reward_stage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat
from rats_video.methods.base import BaseMethod, Critic, LogRow
from rats_video.methods.consistency_loss import BaseConsistencyConfig, trajectory_consistency_loss
from rats_video.methods.context import MethodContext
from rats_video.methods.distribution_matching import (
    NAME,
    DistributionMatching,
    FakeScoreConfig,
    TrainsFakeScore,
    build_matching,
)
from rats_video.methods.draws import FAKE_SCORE, draw_noise
from rats_video.methods.student import score_student_clip, student_rollout
from rats_video.types import PromptBatch


class DollarConfig(TrainsFakeScore, BaseConsistencyConfig):
    """Loss = score_weight * distribution matching + consistency_weight * consistency - reward_weight * R (DOLLAR).

    In the paper the reward is a latent one (`reward.kind=latent`), which needs no decoder; any other works as well.
    """

    draws_levels: ClassVar[bool] = True

    kind: Literal["dollar"]
    fake_score: FakeScoreConfig = FakeScoreConfig(rounds=2)
    score_weight: NonNegativeFloat = Field(1.0, description="of distribution matching")
    consistency_weight: NonNegativeFloat = Field(1.0, description="of consistency")
    reward_stage: float | None = Field(
        None, gt=0, lt=1,
        description="share of the run, at its end, that raises the reward alone, after a share without it, as "
        "published; null = all terms in every update",
    )  # fmt: skip

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """The student's rollout, for matching and the reward; the fake score's own; the pairs."""
        distilled = self.fake_score.evaluations(num_steps, guided) + self.pairs.evaluations(teacher, guided)
        return student + (1 - (self.reward_stage or 0)) * distilled

    def for_plan(self) -> Self:
        """With all terms in every update: that needs most."""
        return self.model_copy(update={"reward_stage": None})

    def build(self, context: MethodContext) -> Dollar:
        """The method on the run's roles."""
        inputs = context.inputs()
        matching = build_matching(self.fake_score, inputs, context.critic)
        from_batch = None if self.reward_stage is None else round((1 - self.reward_stage) * context.num_batches)
        return Dollar(**inputs, config=self, matching=matching, reward_from=from_batch)


@dataclass(frozen=True, kw_only=True)
class Dollar(BaseMethod):
    """Loss = score_weight * distribution matching + consistency_weight * consistency - reward_weight * R_student.

    Args:
        config: its settings.
        matching: teacher and fake score.
        reward_from: index of the first batch that raises the reward alone; None = all terms in every update.
    """

    config: DollarConfig
    matching: DistributionMatching
    reward_from: int | None = None

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The fake score; each of its rounds sees clips from noise of its own. The reward's stage is without it."""
        return {NAME: replace(self.matching.critic(self._clips_from_new_noise), until=self.reward_from)}

    def _clips_from_new_noise(self, batch: PromptBatch, index: int) -> Tensor:
        noise = draw_noise(batch, FAKE_SCORE, index, 2)
        return student_rollout(self, replace(batch, noise=noise), grad_steps=()).x0

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        method, staged = self.config, self.reward_from is not None
        is_rewarded = self.reward_from is None or batch.index >= self.reward_from
        x0 = student_rollout(self, batch).x0
        scores, row = score_student_clip(self, batch, x0, with_gradient=method.uses_gradient and is_rewarded)
        loss = -method.reward_weight * scores.clip.mean() if is_rewarded else x0.new_zeros(())
        terms = {}
        if not (staged and is_rewarded):
            matching = self.matching.loss(x0, batch).mean()
            ends = self.student.sigmas(batch.num_steps, self.shift)
            consistency, _ = trajectory_consistency_loss(self.student, self.teacher, batch, ends, method.pairs)
            loss = method.score_weight * matching + method.consistency_weight * consistency + loss
            terms = {"matching/loss": matching, "consistency/loss": consistency}
        terms["loss"] = loss
        return loss, {name: float(term.detach()) for name, term in terms.items()} | row
