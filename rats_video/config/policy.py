"""Settings of what learns from groups of noisy rollouts: GRPO, RTDMD, and RATS where its reward has no gradient."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from rats_video.config.objective import WITH_GRADIENT, MethodConfig
from rats_video.config.rivals import FakeScoreConfig
from rats_video.config.schema import Config, NonNegativeFloat, OptimizerConfig, PositiveFloat


class PolicyConfig(Config):
    """Noisy rollouts of the student, judged against one another (Flow-GRPO, arXiv 2505.05470): needs no gradient.

    All steps but the last, which draws no noise, can learn from it, whatever `student.grad_steps`.
    """

    samples: int = Field(
        4, ge=2, lt=10**6, description="rollouts a prompt and update, all from the noise of its other rollouts"
    )
    noise: float = Field(0.3, gt=0, le=1, description="share of the noise that each step but the last draws anew")
    normalize: bool = Field(default=True, description="measure rewards in standard deviations of their group")
    clip: PositiveFloat = Field(5.0, description="a lead over the group counts as this much at most, either way")
    trained_share: float = Field(
        1.0, gt=0, le=1, description="share of the noisy steps that learn from an update, chosen at random, rounded up"
    )

    def num_trained(self, num_steps: int) -> int:
        """How many of `num_steps` steps learn from an update."""
        return math.ceil(self.trained_share * (num_steps - 1) - 1e-9)

    def evaluations(self, num_steps: int) -> float:
        """Network evaluations a clip and update."""
        return self.samples * (num_steps + (WITH_GRADIENT - 1) * self.num_trained(num_steps))


class GrpoMethod(MethodConfig):
    """Loss = -advantage * log-likelihood of noisy steps + kl_weight * divergence from the base's (GRPO)."""

    least_steps: ClassVar[int] = 2

    kind: Literal["grpo"]
    policy: PolicyConfig = PolicyConfig()
    kl_weight: NonNegativeFloat = Field(
        0.0, description="pull towards the base model's steps, in Kullback-Leibler divergence a latent number"
    )

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The group's rollouts, and a call of the base at each trained step."""
        base = self.policy.samples * self.policy.num_trained(num_steps) if self.kl_weight > 0 else 0
        return self.policy.evaluations(num_steps) + base


class RtdmdMethod(MethodConfig):
    """Loss = policy_weight * policy - reward_weight * R through the last step + distribution_weight * matching."""

    companions: ClassVar[bool] = True

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
        """Unless it is left out."""
        return self.reward_weight > 0

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The group's rollouts with gradient in their last step too, both scores of each, and the fake score's rounds.

        Each round learns from one further rollout.
        """
        group = self.policy.evaluations(num_steps) + self.policy.samples * (WITH_GRADIENT - 1 + guided + 1)
        return group + self.fake_score.rounds * (num_steps + WITH_GRADIENT)
