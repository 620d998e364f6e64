"""Reward-tilted distribution matching: a group's policy gradient, reward through the last step, and two scores.

RTDMD (arXiv 2605.26108): the divergence of the student's clips from the teacher's distribution tilted towards the
reward is that from the teacher's own, minus the expected reward. The reward's part splits again (its hybrid policy
gradient): the steps that draw noise learn by a group-relative policy gradient, the last step, which draws none, by the
reward's own gradient. The paper's first stage, distribution matching alone, is `cold_start` (`methods/ac_dmd.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from rats_video.config.fields import NonNegativeFloat, PositiveFloat
from rats_video.methods.ac_dmd import AmbientMatching, ConsistentFakeScoreConfig, transition
from rats_video.methods.base import WITH_GRADIENT, BaseMethod, BaseMethodConfig, Critic, LogRow
from rats_video.methods.context import MethodContext
from rats_video.methods.distribution_matching import NAME, DistributionMatching, TrainsFakeScore, build_matching
from rats_video.methods.draws import FAKE_SCORE, RENOISE, STUDENT_LEVEL, draw_noise
from rats_video.methods.finite import SKIPPED
from rats_video.methods.grpo import group_row
from rats_video.methods.policy import PolicyConfig, policy_loss, sample_group, stochastic_rollout
from rats_video.seeds import seeded
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
    fake_score: ConsistentFakeScoreConfig = ConsistentFakeScoreConfig(rounds=1)
    cold_start: float = Field(
        0.0, ge=0, le=1, description="share of the run, at its start, that is distribution matching alone, step by step"
    )

    @property
    def uses_gradient(self) -> bool:
        """True with a weight on the reward."""
        return self.reward_weight > 0

    @property
    def needs_euler(self) -> str | None:
        """The policy, unless its steps are those of a re-noising student."""
        return self.policy.needs_euler

    def needs_other_noise(self, share: float) -> str | None:
        """The policy, unless its steps are those of the sampler."""
        return self.policy.needs_other_noise(share)

    def for_plan(self) -> Self:
        """Without the cold start, which needs less."""
        return self.model_copy(update={"cold_start": 0.0})

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The group's rollouts with gradient in their last step too, both scores of each, and the fake score's rounds.

        Each round learns from one further rollout. In the cold start all of them stop at a step in the middle.
        """
        fake = self.fake_score
        group = self.policy.evaluations(num_steps) + self.policy.samples * (WITH_GRADIENT - 1 + guided + 1)
        whole = group + fake.rounds * (num_steps + fake.calls)
        half = (num_steps - 1) / 2
        cold = half + WITH_GRADIENT + guided + 1 + fake.rounds * (half + 1 + fake.calls)
        return self.cold_start * cold + (1 - self.cold_start) * whole

    def build(self, context: MethodContext) -> Rtdmd:
        """The method on the run's roles."""
        inputs = context.inputs()
        matching = build_matching(self.fake_score, inputs, context.critic)
        cold = self.cold_start * context.num_batches
        return Rtdmd(**inputs, config=self, matching=matching, cold_batches=cold, seed=context.seed)


@dataclass(frozen=True, kw_only=True)
class Rtdmd(BaseMethod):
    """Loss = policy_weight * policy - reward_weight * R + distribution_weight * distribution matching.

    Each term is a mean over all clips of the group. In R and in the matching, gradient goes through the last step of a
    rollout alone.

    Args:
        config: its settings.
        matching: teacher and fake score.
        cold_batches: those of the cold start: distribution matching alone, where a noisy step lands.
        seed: of what is drawn once for a whole batch.
    """

    config: RtdmdConfig
    matching: DistributionMatching
    cold_batches: float = 0.0
    seed: int = 0

    @property
    def ambient(self) -> AmbientMatching:
        """Matching where a noisy step lands."""
        return AmbientMatching(self.matching, self.config.fake_score, self.config.policy.noise)

    def step(self, batch: PromptBatch) -> tuple[Tensor, LogRow]:
        """Loss of one batch, and what to log of it."""
        if batch.index < self.cold_batches:
            loss = self.ambient.loss(*self.one_step(batch, STUDENT_LEVEL), batch).mean()
            return loss, {"loss": float(loss.detach()), "distribution/loss": float(loss.detach()), SKIPPED: 0.0}
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

    def one_step(self, batch: PromptBatch, *stream: int) -> tuple[Tensor, Tensor]:
        """Where a noisy step lands, `[B, C, F, H, W]` with gradient through it alone, and that level, 0-d.

        The step is the same for all clips and processes; those before it have no gradient.
        """
        sigmas = self.student.sigmas(batch.num_steps, self.shift).to(batch.noise.device)
        last = int(torch.randint(batch.num_steps, (), generator=seeded(self.seed, RENOISE, batch.index, *stream)))
        text = batch.condition(self.student)
        latents = text.hold(batch.noise if stream == (STUDENT_LEVEL,) else draw_noise(batch, *stream, 2))
        for step in range(last + 1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                slope = self.student.velocity(latents, sigmas[step].expand(len(latents)), text)
                noise = draw_noise(batch, RENOISE, *stream, step)
                fresh = self.config.policy.noise
                latents = text.hold(transition(latents, slope, sigmas[step], sigmas[step + 1], fresh, noise))
        return latents, sigmas[last + 1]

    @property
    def critics(self) -> Mapping[str, Critic]:
        """The fake score."""
        cfg = self.config.fake_score
        return {NAME: Critic(self.matching.fake.weights, self.fake_score_loss, cfg.optimizer, cfg.rounds)}

    def fake_score_loss(self, batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
        """On what the student makes of new noise: in the cold start where a step lands, else whole clips."""
        with torch.no_grad():
            if batch.index < self.cold_batches:
                start, s = self.one_step(batch, FAKE_SCORE, index)
            else:
                start, s = self._sample(batch, index), None
        return self.ambient.fake_loss(start, s, batch, index)

    def _sample(self, batch: PromptBatch, index: int) -> Tensor:
        """Clips of the noisy sampler from new noise, for a round of the fake score."""
        batch = replace(batch, noise=draw_noise(batch, FAKE_SCORE, index, 2))
        sigmas = self.student.sigmas(batch.num_steps, self.shift)
        return stochastic_rollout(
            self.student, batch, sigmas, self.config.policy.noise, self.config.policy.samples + index
        ).x0
