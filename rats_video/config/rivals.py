"""Settings of the rivals' objectives; `rats_video/rivals/` has a file for each."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rats_video.config.objective import WITH_GRADIENT, MethodConfig
from rats_video.config.reward import RewardConfig
from rats_video.config.schema import Config, NonNegativeFloat, OptimizerConfig, PositiveFloat, PositiveInt


class FakeScoreConfig(Config):
    """A model of what the student makes now, whose weights are of the student's kind (DMD, arXiv 2311.18828).

    It has to keep up with the student: several updates before each one of it (DMD2, arXiv 2405.14867, section 4.2).
    """

    rounds: PositiveInt = Field(5, description="updates before each one of the student, each on clips of new noise")
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    levels: tuple[float, float] = Field(
        (0.02, 0.98), description="least and greatest u of the levels `shift * u / (1 + (shift - 1) * u)` drawn for it"
    )

    @model_validator(mode="after")
    def _levels_rise(self) -> Self:
        low, high = self.levels
        if not 0 < low <= high <= 1:
            raise ValueError(f"levels {list(self.levels)} must rise within (0, 1]")
        return self

    def evaluations(self, sample: float, guided: float) -> float:
        """Network evaluations a clip and update: the fake score's own updates, and the gradient made of it.

        Args:
            sample: evaluations of the clips that it learns from, a round.
            guided: evaluations of one call of the guided teacher.
        """
        return self.rounds * (sample + WITH_GRADIENT) + guided + 1


class PairsConfig(Config):
    """Pairs of neighbouring points of the teacher's path; each costs a call of the student with gradient, one without.

    `path` takes them from the teacher's rollout, one of which serves all pairs of an update and `teacher.reuse`
    updates; `noised` noises the rollout's clip anew and follows the guided teacher for one step.
    """

    source: Literal["path", "noised"] = "path"
    count: PositiveInt = Field(4, description="pairs a clip and update")
    skip: PositiveInt = Field(1, description="steps of the teacher's grid between the two, inside their segment")
    huber: PositiveFloat | None = Field(
        0.03, description="root mean square distance below which the loss is quadratic; null = quadratic always"
    )

    def evaluations(self, teacher: float, guided: float) -> float:
        """Network evaluations a clip and update, with the teacher's."""
        return teacher + self.count * (WITH_GRADIENT + 1 + (guided if self.source == "noised" else 0))


class PathMethod(MethodConfig):
    """What methods have that send points of the teacher's path to one place, and may raise a reward beside it."""

    uses_path: ClassVar[bool] = True

    pairs: PairsConfig = PairsConfig()
    reward_weight: NonNegativeFloat = Field(1.0, description="of the reward in the loss; 0 leaves it out")

    @property
    def uses_gradient(self) -> bool:
        """With a weight on the reward."""
        return self.reward_weight > 0

    @property
    def uses_teacher(self) -> bool:
        """Always: its path."""
        return True


class ConsistencyMethod(PathMethod):
    """Loss = consistency of the student's steps along the teacher's path - reward_weight * R_student (Hyper-SD)."""

    kind: Literal["consistency"]
    stages: tuple[PositiveInt, ...] = Field(
        (1,), min_length=1,
        description="in how many segments each of the student's intervals is cut, one equal share of the run after "
        "the other; the last is 1",
    )  # fmt: skip
    reward_weight: NonNegativeFloat = Field(0.0, description="of the reward, by the last step of the rollout; 0 = off")

    @field_validator("stages")
    @classmethod
    def _ends_with_the_steps_of_inference(cls, stages: tuple[int, ...]) -> tuple[int, ...]:
        if stages[-1] != 1:
            raise ValueError(f"the last of the stages {list(stages)} must be 1: the student's own steps")
        return stages

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The pairs; the reward's rollout has gradient in its last step."""
        return self.pairs.evaluations(teacher, guided) + self.uses_gradient * (num_steps + WITH_GRADIENT - 1)


class T2VTurboMethod(PathMethod):
    """Loss = consistency with the clip - reward_weight * (R + video_weight * R_video) of the clip that is predicted.

    R is the run's reward, in the paper one that scores frames; both judge what the student predicts in one step.
    """

    kind: Literal["t2v_turbo"]
    reward_weight: NonNegativeFloat = Field(1.0, description="of both rewards in the loss")
    video_reward: RewardConfig | None = Field(None, description="judges the same clips; null = none")
    video_weight: PositiveFloat = Field(1.0, description="of `video_reward` beside the run's reward")

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:  # noqa: ARG002
        """The pairs; the rewards judge what they predict."""
        return self.pairs.evaluations(teacher, guided)


class DollarMethod(PathMethod):
    """Loss = score_weight * distribution matching + consistency_weight * consistency - reward_weight * R (DOLLAR).

    In the paper the reward is a latent one (`reward.kind=latent`), which needs no decoder; any other works as well.
    """

    companions: ClassVar[bool] = True

    kind: Literal["dollar"]
    fake_score: FakeScoreConfig = FakeScoreConfig(rounds=2)
    score_weight: NonNegativeFloat = Field(1.0, description="of distribution matching")
    consistency_weight: NonNegativeFloat = 1.0

    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """The student's rollout, which both scores and the reward judge; the fake score's own; the pairs."""
        return student + self.fake_score.evaluations(num_steps, guided) + self.pairs.evaluations(teacher, guided)
