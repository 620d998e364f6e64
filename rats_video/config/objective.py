"""What every method's configuration has: RATS', and those of the rivals that it is compared with."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field

from rats_video.config.schema import Config, NonNegativeFloat, NumClips

WITH_GRADIENT = 3
"""Network evaluations that one with its backward pass counts as."""


class RealDataConfig(Config):
    """Real clips, prepared by `rats-video prepare`, that the student's velocity is kept close to."""

    path: str = Field(description="the cache; its training clips of the run's size are used")
    weight: NonNegativeFloat = Field(0.1, description="of the term in the loss; 0 leaves it out")
    batch_size: NumClips | None = Field(
        None, description="real clips an update, over all processes; null = training.batch_size"
    )
    prompt_dropout: float = Field(0.0, ge=0, le=1, description="share of clips with the empty prompt for their own")
    digest: str | None = Field(None, description="of the cache's clips; the run writes it down")


class MethodConfig(Config):
    """What every method has."""

    companions: ClassVar[bool] = False
    """Whether other networks learn beside the student."""

    least_steps: ClassVar[int] = 1
    """Solver steps without which nothing would be learned."""

    uses_path: ClassVar[bool] = False
    """Whether all points of the teacher's rollouts are asked for."""

    drift_weight: NonNegativeFloat = Field(
        0.0, description="pull of the weights towards where they started: half this times the squared distance"
    )
    real_data: RealDataConfig | None = Field(None, description="flow matching on real clips beside it; null = none")

    @property
    def uses_gradient(self) -> bool:
        """Whether the reward's own gradient is in the loss."""
        return False

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher's rollouts are asked for."""
        return False

    @abstractmethod
    def evaluations(self, num_steps: int, student: float, teacher: float, guided: float) -> float:
        """Network evaluations a clip and update; one with gradient counts `WITH_GRADIENT`.

        Args:
            num_steps: the student's.
            student: evaluations of its rollout with the gradient that `student.grad_steps` asks for.
            teacher: evaluations of a teacher rollout.
            guided: evaluations of one call of the guided teacher.
        """
