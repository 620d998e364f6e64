"""Reward-tilted distribution matching: a group's policy gradient, reward through the last step, and two scores.

RTDMD (arXiv 2605.26108): the divergence of the student's clips from the teacher's distribution tilted towards the
reward is that from the teacher's own, minus the expected reward. The reward's part splits again (its hybrid policy
gradient): the steps that draw noise learn by a group-relative policy gradient, the last step, which draws none, by the
reward's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat, PositiveFloat
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, BaseMethodConfig, Critic, LogRow, MethodContext
from rats_video.methods.distribution_matching import (
    NAME,
    DistributionMatching,
    FakeScoreConfig,
    TrainsFakeScore,
    build_matching,
)
from rats_video.methods.draws import FAKE_SCORE, draw_noise
from rats_video.methods.grpo import group_row
from rats_video.methods.policy import PolicyConfig, policy_loss, sample_group, stochastic_rollout
from rats_video.optim import OptimizerConfig
from rats_video.types import PromptBatch


class RtdmdConfig(TrainsFakeScore, BaseMethodConfig):
    """Loss = policy_weight * policy - reward_weight * R through the last step + distribution_weight * matching."""

    draws_levels: ClassVar[bool] = True

    kind: Literal["rtdmd"]
    policy: PolicyConfig = PolicyConfig()
    policy_weight: NonNegativeFloat = Field(1.0, description="of the group's policy gradient, on the noisy steps")
    reward_weight: NonNegativeFloat = Field(
        1.0, description="of the reward's own gradient, through the last step alone; 0 for rewards that have none"
    )
    distribution_weight: PositiveFloat = Field(0.001, description="of distribution matching, through the last step")
    fake_score: FakeScoreConfig = FakeScoreConfig(rounds=1, optimizer=OptimizerConfig(lr=3e-4))

    @property
    def uses_gradient(self) -> bool:
        """True with a weight on the reward."""
        return self.reward_weight > 0

    @property
    def needs_euler(self) -> str | None:
        """The policy, unless its steps are those of a re-noising student."""
        return self.policy.needs_euler

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The group's rollouts with gradient in their last step too, both scores of each, and the fake score's rounds.

        Each round learns from one further rollout.
        """
        group = self.policy.evaluations(num_steps) + self.policy.samples * (WITH_GRADIENT - 1 + guided + 1)
        return group + self.fake_score.rounds * (num_steps + WITH_GRADIENT)

    def build(self, context: MethodContext) -> Rtdmd:
        """The method on the run's roles."""
        inputs = context.inputs()
        return Rtdmd(**inputs, config=self, matching=build_matching(self.fake_score, inputs, context.critic))


@dataclass(frozen=True, kw_only=True)
class Rtdmd(BaseMethod):
    """Loss = policy_weight * policy - reward_weight * R + distribution_weight * distribution matching.

    Each term is a mean over all clips of the group. In R and in the matching, gradient goes through the last step of a
    rollout alone.
    """

    config: RtdmdConfig
    matching: DistributionMatching

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        method, sigmas = self.config, self.student.sigmas(batch.num_steps, self.shift)
        group = sample_group(
            self.student, self.reward, batch, sigmas, method.policy,
            through_last=True, with_gradient=method.uses_gradient,
        )  # fmt: skip
        rewards = group.rewards(group.kept)
        policy = policy_loss(group, rewards.detach()).mean()
        matched = [self.matching.loss(path.x0, batch, sample) for sample, path in enumerate(group.paths)]
        matching = (torch.stack(matched) * group.kept).mean()
        loss = (
            method.policy_weight * policy
            - method.reward_weight * rewards.mean()
            + method.distribution_weight * matching
        )
        row = {"policy/loss": policy, "distribution/loss": matching, "loss": loss}
        return loss, {name: float(value.detach()) for name, value in row.items()} | group_row(group, batch)

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The fake score."""
        return {NAME: self.matching.critic(self._sample)}

    def _sample(self, batch: PromptBatch, index: int) -> Tensor:
        """Clips of the noisy sampler from new noise, for a round of the fake score."""
        batch = replace(batch, noise=draw_noise(batch, FAKE_SCORE, index, 2))
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        return stochastic_rollout(
            self.student, batch, sigmas, self.config.policy.noise, self.config.policy.samples + index
        ).x0
