"""Adversarial reward and distribution matching by turns (AdvDMD, arXiv 2604.28126), from its abstract and summaries.

DMD2's discriminator (`methods/dmd2.py`) is the reward of a policy gradient: it tells the student's clips from real ones
on the way as at the end, and learns along, so that there is no fixed judge to deceive. Both simulate the student by one
noisy sampler, and each has updates of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import PositiveFloat, PositiveInt
from rats_video.methods.base import BaseMethod, BaseMethodConfig, Critic, LogRow, StepsConfig
from rats_video.methods.context import MethodContext
from rats_video.methods.discriminator import Discriminator, GanConfig
from rats_video.methods.distribution_matching import DistributionMatching, FakeScoreConfig, TrainsFakeScore
from rats_video.methods.dmd2 import Dmd2, Dmd2Config, GeneratedClips
from rats_video.methods.finite import SKIPPED
from rats_video.methods.policy import Group, PolicyConfig, StochasticRollout, policy_loss, sample_rollouts
from rats_video.types import PromptBatch, RewardScores


class AdvDmdConfig(TrainsFakeScore, BaseMethodConfig):
    """Loss = distribution matching + gan.weight * gan, or policy_weight * policy gradient of the logit, by turns."""

    draws_levels: ClassVar[bool] = True
    least_steps: ClassVar[int] = 2

    kind: Literal["advdmd"]
    fake_score: FakeScoreConfig = FakeScoreConfig()
    gan: GanConfig = GanConfig()
    policy: PolicyConfig = PolicyConfig(noise=1.0)
    policy_weight: PositiveFloat = Field(1.0, description="of the policy gradient, in updates that it has to itself")
    policy_every: PositiveInt = Field(
        2, description="each so many-th update is the policy's, all others are matching's"
    )
    policy_from: float = Field(0.25, ge=0, le=1, description="share of the run before the first of them")

    @property
    def dmd2(self) -> Dmd2Config:
        """Its other updates."""
        return Dmd2Config(kind="dmd2", fake_score=self.fake_score, gan=self.gan, real_data=self.real_data)

    @property
    def uses_teacher(self) -> bool:
        """True if its rollouts are the discriminator's real clips."""
        return self.dmd2.uses_teacher

    @property
    def needs_euler(self) -> str | None:
        """The policy, unless its steps are those of a re-noising student."""
        return self.policy.needs_euler

    def simulates(self, steps: StepsConfig) -> bool:
        """As DMD2: of a student that re-noises."""
        return self.dmd2.simulates(steps)

    def for_plan(self) -> Self:
        """Matching alone, which needs more."""
        return self.model_copy(update={"policy_from": 1.0})

    @property
    def policy_share(self) -> float:
        """The share of updates that are the policy's."""
        return (1 - self.policy_from) / self.policy_every

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """A mean over both kinds of update, with the critic's rounds in each."""
        return self._mean(self.dmd2.evaluations(num_steps, student, teacher, guided), num_steps, guided, student)

    def evaluations_of(self, steps: StepsConfig, num_steps: int, teacher: float, guided: float) -> float:
        """The same of a run's student."""
        if steps.sampler == "euler":
            return super().evaluations_of(steps, num_steps, teacher, guided)
        levels = steps.gradient_steps(num_steps)
        found = self.dmd2.evaluations_of(steps, num_steps, teacher, guided)
        return self._mean(found, num_steps, guided, sum(levels) / len(levels) + 3)

    def _mean(self, matching: float, num_steps: int, guided: float, student: float) -> float:
        """Of an update of matching its student's clip, scores and logit are left out where the policy has its own."""
        own = student + guided + 1 + 3
        policy = self.policy.evaluations(num_steps) + self.policy.samples * num_steps
        return matching + self.policy_share * (policy - own)

    def build(self, context: MethodContext) -> AdvDmd:
        """The method on the run's roles."""
        dmd = self.dmd2.build(context)
        first = self.policy_from * context.num_batches
        fields = {name: getattr(dmd, name) for name in BaseMethod.__dataclass_fields__}
        return AdvDmd(**fields, config=self, dmd=dmd, policy_from=first)


@dataclass(frozen=True, kw_only=True)
class AdvDmd(BaseMethod):
    """DMD2's loss, or the policy gradient of its discriminator's logit.

    Args:
        config: its settings.
        dmd: makes the other updates, and has the critic.
        policy_from: index of the batch before which the policy has none.
    """

    config: AdvDmdConfig
    dmd: Dmd2
    policy_from: float = 0.0

    @property
    def critics(self) -> Mapping[str, Critic]:
        """DMD2's: the fake score and the discriminator, which learn before both kinds of update."""
        return self.dmd.critics

    @property
    def matching(self) -> DistributionMatching:
        """DMD2's."""
        return self.dmd.matching

    def is_policy(self, batch: PromptBatch) -> bool:
        """True if the batch's update is the policy's."""
        return (
            batch.index >= self.policy_from and batch.index % self.config.policy_every == self.config.policy_every - 1
        )

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        if not self.is_policy(batch):
            return self.dmd.step(batch)
        assert self.dmd.gan is not None
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        paths = sample_rollouts(self.student, batch, sigmas, self.config.policy)
        with torch.no_grad():
            logits = torch.stack([self.logit(self.dmd.gan, path, sigmas, batch) for path in paths])
        policy = policy_loss(Group(paths, tuple(map(RewardScores, logits)), self.config.policy), logits).mean()
        loss = self.config.policy_weight * policy
        row = {"loss": loss, "policy/loss": policy, "gan/student": logits.mean()}
        return loss, {SKIPPED: 0.0} | {name: float(each.detach()) for name, each in row.items()}

    def logit(self, gan: Discriminator, path: StochasticRollout, sigmas: Tensor, batch: PromptBatch) -> Tensor:
        """`[B]`: the mean over the states of a rollout, each at its level, and the clip, noised as in training."""
        text = batch.condition(self.student)
        found = [
            gan(state, sigma.to(state).expand(len(state)), text)[1]
            for state, sigma in zip(path.states, sigmas[1:-1], strict=True)
        ]
        found.append(self.dmd.logit(gan, GeneratedClips(path.x0, text), batch))
        return torch.stack(found).mean(dim=0)
