"""Distribution matching: clips become likelier to the teacher and less likely to a model of the student's own clips.

DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867): the gradient of the divergence between what the student makes and
what the teacher would make, both noised, is the difference of two scores. The teacher has one; the other, the fake
score, is a network that learns from the student's clips while the student learns from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rats_video.condition import Condition
from rats_video.config.fields import Config, PositiveInt
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.schedule import shift_sigma
from rats_video.errors import UserError
from rats_video.methods.base import WITH_GRADIENT, Critic, LogRow
from rats_video.methods.context import MethodInputs
from rats_video.methods.draws import FAKE_SCORE, SCORE_LEVEL, draw_noise, draw_uniform
from rats_video.methods.teacher import FrozenTeacherConfig, TeacherSampler
from rats_video.optim import OptimizerConfig
from rats_video.types import Backbone, PromptBatch


class FakeScoreConfig(Config):
    """A model of what the student makes now, whose weights are of the student's kind (DMD, arXiv 2311.18828).

    It has to keep up with the student: several updates before each one of it (DMD2, arXiv 2405.14867, section 4.2).
    """

    rounds: PositiveInt = Field(5, description="updates before each one of the student, each on clips of new noise")
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-4)
    levels: tuple[float, float] = Field(
        (0.02, 0.98), description="least and greatest u of the levels `shift * u / (1 + (shift - 1) * u)` drawn for it"
    )
    density: Literal["uniform", "logit_normal"] = Field(
        "uniform",
        description="how u is drawn between them; logit_normal, the sigmoid of a normal number, favours the middle",
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


class TrainsFakeScore:
    """Of a method's settings: the critic that learns beside the student is the fake score."""

    if TYPE_CHECKING:  # a field of the method's own settings
        fake_score: FakeScoreConfig

    @property
    def critic_rounds(self) -> int:
        """The fake score's."""
        return self.fake_score.rounds

    @property
    def critic_optimizer(self) -> OptimizerConfig:
        """The fake score's."""
        return self.fake_score.optimizer


NAME = "fake_score"
"""The critic's name: of its files in a checkpoint and of its rows in the log."""


@dataclass(frozen=True)
class DistributionMatching:
    """The two scores.

    Args:
        teacher: its guided score draws the clips.
        fake: models the student's clips; starts as the base.
        cfg: how it is trained.
        shift: of the sigma grid, by which noise levels are drawn as well.
    """

    teacher: TeacherSampler
    fake: Backbone
    cfg: FakeScoreConfig
    shift: float

    def renoise(self, x0: Tensor, batch: PromptBatch, *stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clips `[B, C, F, H, W]` noised to levels of their own: `latents, noise, sigma [B]`."""
        low, high = self.cfg.levels
        u = draw_uniform(batch, *stream, 0)
        u = low + (high - low) * (u if self.cfg.density == "uniform" else torch.special.ndtri(u).sigmoid())
        sigma = self.fake.nearest_levels(shift_sigma(u, self.shift)).to(x0)
        noise = draw_noise(batch, *stream, 1)
        return add_noise(x0, noise, sigma), noise, sigma

    def loss(
        self,
        x0: Tensor,
        batch: PromptBatch,
        *stream: int,
        condition: Condition | None = None,
        teacher_at: Tensor | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """`[B]`: means over a clip's elements, so that the gradient by each of them is that of DMD's equations 7 and 8.

        Of the noised clip, teacher and fake score predict two clips, and

            gradient = (x0_fake - x0_teacher) / mean |x0 - x0_teacher|,
            loss = mean (x0 - stopgrad(x0 - gradient))^2 / 2.

        Args:
            x0: the student's clips `[B, C, F, H, W]`.
            batch: of these clips; noise and levels are drawn by its seeds.
            stream: tells draws apart where a step needs several.
            condition: the clips were made of it; None = that of the batch.
            teacher_at: clips whose noised version the teacher is asked about instead, with the same noise and level.
            guidance: scale of the teacher's; None = its own.
        """
        with torch.no_grad():
            latents, noise, sigma = self.renoise(x0, batch, SCORE_LEVEL, *stream)
            seen = latents if teacher_at is None else add_noise(teacher_at, noise, sigma)
            condition = condition or batch.condition(self.fake)
            away = sigma.view(-1, 1, 1, 1, 1)
            by_teacher = seen - away * self.teacher.velocity(seen, sigma, condition, guidance)
            by_fake = latents - away * self.fake.velocity(latents, sigma, condition)
        return matching_loss(x0, by_teacher, by_fake)

    @staticmethod
    def flow_error(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """`[B]`: mean square of `velocity - (noise - x0)`."""
        return (velocity - (noise - x0)).square().mean(dim=(1, 2, 3, 4))

    def fake_loss(self, x0: Tensor, condition: Condition, batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
        """The fake score's loss of a round, 0-d, on the student's clips of a text, and its row."""
        latents, noise, sigma = self.renoise(x0, batch, FAKE_SCORE, index)
        mean = self.flow_error(self.fake.velocity(latents, sigma, condition), x0, noise).mean()
        return mean, {"loss": float(mean.detach())}

    def critic(self, sample: Callable[[PromptBatch, int], Tensor]) -> Critic:
        """The fake score, as the training loop updates it: by flow matching on the student's clips.

        Args:
            sample: `(batch, round) -> clips [B, C, F, H, W]` of the student as it is; called without gradient.
        """

        def loss(batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
            with torch.no_grad():
                x0 = sample(batch, index)
            return self.fake_loss(x0, batch.condition(self.fake), batch, index)

        return Critic(self.fake.weights, loss, self.cfg.optimizer, self.cfg.rounds)


def matching_loss(made: Tensor, by_teacher: Tensor, by_fake: Tensor) -> Tensor:
    """`[B]`, whose gradient by `made` is, over its size, `(by_fake - by_teacher) / mean |made - by_teacher|`."""
    with torch.no_grad():
        size = (made - by_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
        target = made - (by_fake - by_teacher) / size
    return (made - target).square().mean(dim=(1, 2, 3, 4)) / 2


def build_matching(cfg: FakeScoreConfig, inputs: MethodInputs, critic: Backbone) -> DistributionMatching:
    """The two scores of distribution matching.

    Raises:
        UserError: the teacher is an average of the student: there would be nothing to match.
    """
    if not isinstance(inputs["teacher"].cfg, FrozenTeacherConfig):
        raise UserError(
            "is the student's own average: matching what it makes would change nothing", where="teacher.kind",
            fix="set teacher.kind=frozen",
        )  # fmt: skip
    return DistributionMatching(inputs["teacher"], critic, cfg, inputs["shift"])
