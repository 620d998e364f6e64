"""Settings of distribution matching as DMD2 does it, and of what has been added to it."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.objective import WITH_GRADIENT, MethodConfig
from rats_video.config.policy import PolicyConfig
from rats_video.config.rivals import FakeScoreConfig
from rats_video.config.schema import Config, NonNegativeFloat, PositiveFloat


class GanConfig(Config):
    """A discriminator on features of the fake score's middle block (DMD2, arXiv 2405.14867, section 4.3).

    Real are the clips of `real_data`, where it is given, otherwise the teacher's own rollouts.
    """

    weight: PositiveFloat = Field(5e-3, description="of `softplus(-logit)` of the student's clips in its loss")
    fake_score_weight: PositiveFloat = Field(1e-2, description="of the discriminator's loss in the fake score's")


class AdversarialReward(Config):
    """The discriminator's logit as a reward that noisy rollouts are compared by (AdvDMD, arXiv 2604.28126).

    As we read it: the discriminator knows clips at all levels of noise and learns along with the student, so that its
    reward is no fixed one to be hacked. AdvDMD's schedule, more of the policy as training goes on, is not in it.
    """

    weight: PositiveFloat = Field(0.1, description="of the policy gradient in the loss")
    policy: PolicyConfig = PolicyConfig()


class Dmd2Method(MethodConfig):
    """Loss = distribution matching (- reward_weight * R_student) (+ gan.weight * gan), on the student's last clip.

    With `adversarial_reward` a policy gradient joins them.
    """

    companions: ClassVar[bool] = True

    kind: Literal["dmd2"]
    fake_score: FakeScoreConfig = FakeScoreConfig()
    reward_weight: NonNegativeFloat = Field(0.0, description="of the reward's own gradient beside it; 0 leaves it out")
    gan: GanConfig | None = None
    adversarial_reward: AdversarialReward | None = None
    ida: float | None = Field(
        None, ge=0, lt=1,
        description="implicit distribution alignment (SenseFlow, arXiv 2506.00523): after each update of the student "
        "the fake score keeps this much of its weights and takes the rest from the student's, e.g. 0.97",
    )  # fmt: skip
    data_forcing: float = Field(
        0.0, ge=0, le=1,
        description="share of updates (0.5 is published) on clips of `real_data`, noised to a level of the student: "
        "it goes on from there, and the teacher is asked about the real clip (Data-Forcing, arXiv 2606.18478, eq. 10)",
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.data_forcing and self.real_data is None:
            raise ValueError("data_forcing needs real_data, a cache; its weight may be 0")
        if self.adversarial_reward is not None and self.gan is None:
            raise ValueError("adversarial_reward is the logit of a discriminator: it needs gan")
        return self

    @property
    def uses_gradient(self) -> bool:
        """Where a reward term stands beside it."""
        return self.reward_weight > 0

    @property
    def uses_teacher(self) -> bool:
        """Where its rollouts are the discriminator's real clips."""
        return self.gan is not None and self.real_data is None

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """Rollouts for student and fake score, its updates, the gradient; a mean where some begin at real clips."""
        share = 1 - self.data_forcing * (1 - (num_steps + 1) / 2 / num_steps)  # of a rollout's steps that are made
        found = share * student + self.fake_score.evaluations(share * num_steps, guided)
        if self.gan is not None:
            found += WITH_GRADIENT * (self.fake_score.rounds + 1) + teacher * self.uses_teacher
        if self.adversarial_reward is not None:
            policy = self.adversarial_reward.policy
            found += policy.evaluations(num_steps) + policy.samples
        return found
