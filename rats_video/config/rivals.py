"""Settings of the rivals' objectives; `rats_video/rivals/` has a file for each."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from rats_video.config.objective import WITH_GRADIENT
from rats_video.config.schema import Config, OptimizerConfig, PositiveInt


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
