"""Ambient-consistent distribution matching (AC-DMD), the cold start of RTDMD (arXiv 2605.26108; its code, `ac_dmd_*`).

A student that draws noise on its way never shows the clip that an early step predicts, but where the step lands:
latents at its end s, noisy themselves. They are matched there: noised further, to a level t above s, from where teacher
and fake score each lead back to s. The difference of the two is the gradient. The fake score learns the noise between
the two levels, and by a second term that what it predicts from t agrees with what it predicts a little further down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from rats_video.condition import Condition
from rats_video.config.fields import NonNegativeFloat
from rats_video.diffusion.flow import stochastic_step
from rats_video.methods.base import WITH_GRADIENT, LogRow
from rats_video.methods.distribution_matching import DistributionMatching, FakeScoreConfig, matching_loss
from rats_video.methods.draws import FAKE_SCORE, SCORE_LEVEL, draw_noise, draw_uniform
from rats_video.types import PromptBatch


class ConsistentFakeScoreConfig(FakeScoreConfig):
    """A model of what the student makes now, which also learns that its predictions along a path agree (RTDMD)."""

    consistency_weight: NonNegativeFloat = Field(
        0.0, description="of the agreement of its predictions; 0.01 is published, 0 leaves it and two calls out"
    )
    consistency_span: float = Field(0.2, gt=0, le=1, description="greatest distance in sigma of what is to agree")

    @property
    def calls(self) -> int:
        """Network evaluations of a round on its clips; the agreement takes two more calls."""
        return WITH_GRADIENT * (3 if self.consistency_weight > 0 else 1)


MARGIN = 0.01
"""Least distance of the level t from s."""

MOST_WEIGHT = 10.0
"""Of the fake score's error, times `1 / std^2` of the noise between the levels."""


@dataclass(frozen=True)
class Between:
    """Latents at the end of a step, noised further.

    Args:
        latents: `[B, C, F, H, W]` at level t.
        sigma: t, `[B]`.
        noise: that came to them.
        std: of it, `[B, 1, 1, 1, 1]`.
        target: of `std * velocity`.
    """

    latents: Tensor
    sigma: Tensor
    noise: Tensor
    std: Tensor
    target: Tensor


def noise_further(start: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Between:
    """Latents `[B, C, F, H, W]` at level s (0-d) noised to level t `[B]` above it.

    With `a = (1 - t) / (1 - s)` they are `a * start + std * noise`, `std^2 = t^2 - a^2 s^2`. The velocity that is the
    best guess of `noise - x0` for latents of that level is that of

        std * velocity = -std / (1 - s) * start + (t + (1 - t) / (1 - s)^2 * s^2) * noise,

    in the mean over all that may have led there; at s = 0 it is `t * (noise - x0)`.
    """
    wide = t.view(-1, 1, 1, 1, 1)
    share = (1 - wide) / (1 - s)
    std = (wide.square() - share.square() * s.square()).clamp(min=1e-12).sqrt()
    target = -std / (1 - s) * start + (wide + (1 - wide) / (1 - s).square() * s.square()) * noise
    return Between(share * start + std * noise, t, noise, std, target)


def transition(latents: Tensor, velocity: Tensor, sigma: Tensor, end: Tensor, fresh: float, noise: Tensor) -> Tensor:
    """A noisy step (`diffusion/flow.py`) of each clip between levels `[B]` of its own."""
    mean, std = stochastic_step(latents, velocity, _wide(sigma), _wide(end), fresh)
    return mean + std * noise


def _wide(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)


@dataclass(frozen=True)
class AmbientMatching:
    """The two scores, at the ends of noisy steps.

    Args:
        matching: teacher and fake score.
        cfg: how that learns.
        fresh: share of its noise that a step draws anew.
    """

    matching: DistributionMatching
    cfg: ConsistentFakeScoreConfig
    fresh: float

    def draw(self, start: Tensor, s: Tensor, batch: PromptBatch, *stream: int) -> Between:
        """Latents at level s, noised to levels uniform above it."""
        u = draw_uniform(batch, *stream, 0).to(start)
        low, high = self.cfg.levels
        t = (s + MARGIN + (1 - s - MARGIN) * u).clamp(low, high)
        return noise_further(start, s, self.matching.fake.nearest_levels(t).to(start), draw_noise(batch, *stream, 1))

    def loss(self, start: Tensor, s: Tensor, batch: PromptBatch) -> Tensor:
        """`[B]`: distribution matching at the level s of latents with gradient `[B, C, F, H, W]`."""
        with torch.no_grad():
            between, text = self.draw(start, s, batch, SCORE_LEVEL), batch.condition(self.matching.fake)
            noise, end = draw_noise(batch, SCORE_LEVEL, 2), s.expand(len(start))
            slopes = [
                score(between.latents, between.sigma, text)
                for score in (self.matching.teacher.velocity, self.matching.fake.velocity)
            ]
            ends = [transition(between.latents, slope, between.sigma, end, self.fresh, noise) for slope in slopes]
        return matching_loss(start, *ends)

    def fake_loss(self, start: Tensor, s: Tensor | None, batch: PromptBatch, index: int) -> tuple[Tensor, LogRow]:
        """The fake score's loss of a round, 0-d, on latents at level s, or on clips (None), and its row."""
        text = batch.condition(self.matching.fake)
        if s is None:
            latents, noise, sigma = self.matching.renoise(start, batch, FAKE_SCORE, index)
            velocity = self.matching.fake.velocity(latents, sigma, text)
            flow = self.matching.flow_error(velocity, start, noise).mean()
        else:
            between = self.draw(start, s, batch, FAKE_SCORE, index)
            latents, sigma = between.latents, between.sigma
            velocity = self.matching.fake.velocity(latents, sigma, text)
            weight = between.std.square().reciprocal().clamp(max=MOST_WEIGHT)
            flow = (weight * (between.std * velocity - between.target).square()).mean()
        if self.cfg.consistency_weight == 0:
            return flow, {"loss": float(flow.detach())}
        agreement = self.disagreement(latents, sigma, velocity, text, batch, index)
        loss = flow + self.cfg.consistency_weight * agreement
        row = {"loss": loss, "flow": flow, "consistency": agreement}
        return loss, {name: float(each.detach()) for name, each in row.items()}

    def disagreement(
        self, latents: Tensor, sigma: Tensor, velocity: Tensor, text: Condition, batch: PromptBatch, index: int
    ) -> Tensor:
        """0-d: the product of how far two predictions from further down are off the one from here, without bias.

        Two noisy steps of their own noise lead from here to one level up to `cfg.consistency_span` below. A square
        would count the variance that their noise brings; the product of two independent ones does not. It may be
        negative.
        """
        u = draw_uniform(batch, FAKE_SCORE, index, 3).to(sigma)
        lower = self.matching.fake.nearest_levels((sigma - self.cfg.consistency_span * u).clamp(min=0.0)).to(sigma)
        here = latents - _wide(sigma) * velocity
        off = []
        for path in (4, 5):
            noise = draw_noise(batch, FAKE_SCORE, index, path)
            there = transition(latents, velocity.detach(), sigma, lower, self.fresh, noise)
            off.append(there - _wide(lower) * self.matching.fake.velocity(there, lower, text) - here)
        return (off[0] * off[1]).mean()
