"""Reward-tilted distribution matching: a group's policy gradient, reward through the last step, and two scores.

RTDMD (arXiv 2605.26108): the divergence of the student's clips from the teacher's distribution tilted towards the
reward is that from the teacher's own, minus the expected reward. The reward's part splits again (its hybrid policy
gradient): the steps that draw noise learn by a group-relative policy gradient, the last step, which draws none, by the
reward's own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rats_video.config.policy import RtdmdMethod
from rats_video.distill.distribution import NAME, DistributionMatching
from rats_video.distill.draws import FAKE_SCORE, draw_noise
from rats_video.distill.method import Companion, Players, Row
from rats_video.distill.policy import noisy_rollout, policy_loss, sample_group
from rats_video.rivals.grpo import group_row
from rats_video.types import PromptBatch


@dataclass(frozen=True, kw_only=True)
class Rtdmd(Players):
    """Loss = policy_weight * policy - reward_weight * R + distribution_weight * distribution matching.

    Each term is a mean over all clips of the group. In R and in the matching, gradient goes through the last step of a
    rollout alone.
    """

    method: RtdmdMethod
    matching: DistributionMatching

    def step(self, batch: PromptBatch) -> tuple[Tensor, Row]:
        """Loss of one batch, and what to log of it."""
        method, sigmas = self.method, self.student.sigmas(batch.num_steps, self.shift)
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
    def companions(self) -> Mapping[str, Companion]:
        """The fake score."""
        return {NAME: self.matching.companion(self._sample)}

    def _sample(self, batch: PromptBatch, index: int) -> Tensor:
        """Clips of the noisy sampler from new noise, for a round of the fake score."""
        batch = replace(batch, noise=draw_noise(batch, FAKE_SCORE, index, 2))
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        return noisy_rollout(
            self.student, batch, sigmas, self.method.policy.noise, self.method.policy.samples + index
        ).x0
