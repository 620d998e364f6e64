"""Distribution matching: clips become likelier to the teacher and less likely to a model of the student's own clips.

DMD (arXiv 2311.18828) and DMD2 (arXiv 2405.14867): the gradient of the divergence between what the student makes and
what the teacher would make, both noised, is the difference of two scores. The teacher has one; the other, the fake
score, is a network that learns from the student's clips while the student learns from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.config.rivals import FakeScoreConfig
from rats_video.diffusion.flow import add_noise
from rats_video.diffusion.schedule import shift_sigma
from rats_video.distill.draws import FAKE_SCORE, SCORE_LEVEL, draw_noise, draw_uniform
from rats_video.distill.method import Companion, Row
from rats_video.distill.teacher import TeacherSampler
from rats_video.types import Backbone, PromptBatch, TextCondition

NAME = "fake_score"
"""Of the companion: its files in a checkpoint and its part of the log."""


@dataclass(frozen=True)
class DistributionMatching:
    """The two scores.

    Args:
        teacher: whose guided score clips are drawn to.
        fake: models the student's clips; starts as the base.
        cfg: how it is trained.
        shift: of the sigma grid, by which noise levels are drawn as well.
    """

    teacher: TeacherSampler
    fake: Backbone
    cfg: FakeScoreConfig
    shift: float

    def noised(self, x0: Tensor, batch: PromptBatch, *stream: int) -> tuple[Tensor, Tensor, Tensor]:
        """Clips `[B, C, F, H, W]` noised to levels of their own: `latents, noise, sigma [B]`."""
        low, high = self.cfg.levels
        u = low + (high - low) * draw_uniform(batch, *stream, 0)
        sigma = self.fake.nearest_levels(shift_sigma(u, self.shift)).to(x0)
        noise = draw_noise(batch, *stream, 1)
        return add_noise(x0, noise, sigma), noise, sigma

    def loss(
        self,
        x0: Tensor,
        batch: PromptBatch,
        *stream: int,
        text: TextCondition | None = None,
        teacher_at: Tensor | None = None,
    ) -> Tensor:
        """`[B]`: means over a clip's elements, so that the gradient by each of them is that of DMD's equations 7 and 8.

        Of the noised clip, teacher and fake score predict two clips, and

            gradient = (x0_fake - x0_teacher) / mean |x0 - x0_teacher|,
            loss = mean (x0 - stopgrad(x0 - gradient))^2 / 2.

        Args:
            x0: the student's clips `[B, C, F, H, W]`.
            batch: of these clips; noise and levels are drawn by its seeds.
            stream: tells draws apart where a step needs several.
            text: they were made of; None = that of the batch.
            teacher_at: clips whose noised version the teacher is asked about instead, with the same noise and level.
        """
        with torch.no_grad():
            latents, noise, sigma = self.noised(x0, batch, SCORE_LEVEL, *stream)
            seen = latents if teacher_at is None else add_noise(teacher_at, noise, sigma)
            text = text or self.fake.encode_text(batch.prompts)
            away = sigma.view(-1, 1, 1, 1, 1)
            by_teacher = seen - away * self.teacher.velocity(seen, sigma, text)
            by_fake = latents - away * self.fake.velocity(latents, sigma, text)
            size = (x0 - by_teacher).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
            target = x0 - (by_fake - by_teacher) / size
        return (x0 - target).square().mean(dim=(1, 2, 3, 4)) / 2

    @staticmethod
    def flow_error(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """`[B]`: mean square of `velocity - (noise - x0)`."""
        return (velocity - (noise - x0)).square().mean(dim=(1, 2, 3, 4))

    def fake_loss(self, x0: Tensor, text: TextCondition, batch: PromptBatch, index: int) -> tuple[Tensor, Row]:
        """The fake score's loss of a round, 0-d, on the student's clips of a text, and its row."""
        latents, noise, sigma = self.noised(x0, batch, FAKE_SCORE, index)
        mean = self.flow_error(self.fake.velocity(latents, sigma, text), x0, noise).mean()
        return mean, {"loss": float(mean.detach())}

    def companion(self, sample: Callable[[PromptBatch, int], Tensor]) -> Companion:
        """The fake score, as the training loop updates it: by flow matching on the student's clips.

        Args:
            sample: `(batch, round) -> clips [B, C, F, H, W]` of the student as it is; called without gradient.
        """

        def loss(batch: PromptBatch, index: int) -> tuple[Tensor, Row]:
            with torch.no_grad():
                x0 = sample(batch, index)
            return self.fake_loss(x0, self.fake.encode_text(batch.prompts), batch, index)

        return Companion(self.fake.weights, loss, self.cfg.optimizer, self.cfg.rounds)
