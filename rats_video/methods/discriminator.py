"""A discriminator on the fake score's features: tells the student's clips, noised, from real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus

from rats_video.condition import Condition
from rats_video.config.fields import Config, PositiveFloat
from rats_video.types import VelocityAndFeatures


class GanConfig(Config):
    """A discriminator on features of the fake score's middle block (DMD2, arXiv 2405.14867, section 4.3).

    Real are the clips of `real_data`, where it is given, otherwise the teacher's own rollouts.
    """

    weight: PositiveFloat = Field(5e-3, description="of `softplus(-logit)` of the student's clips in its loss")
    fake_score_weight: PositiveFloat = Field(1e-2, description="of the discriminator's loss in the fake score's")


class DiscriminatorHead(nn.Module):
    """Logit `[B]` of features `[B, tokens, width]`: a small network on each token, and the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Above 0: real."""
        logits: Tensor = self.layers(features)
        return logits.mean(dim=(1, 2))


@dataclass(frozen=True)
class Discriminator:
    """DMD2's (arXiv 2405.14867, section 4.3): `log(1 + exp(...))` on both sides, that is the non-saturating loss.

    Args:
        features: one call of the fake score that gives its velocity and its features.
        head: what learns here; the features learn along, as part of the fake score.
        cfg: weights of the losses.
        mean_of_tokens: of the logits that processes which share each clip find for their tokens.
    """

    features: VelocityAndFeatures
    head: DiscriminatorHead
    cfg: GanConfig
    mean_of_tokens: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The fake score's velocity `[B, C, F, H, W]` and the logit `[B]`, of one evaluation a clip."""
        velocity, features = self.features(latents, sigma, condition)
        return velocity, self.mean_of_tokens(self.head(features))

    @staticmethod
    def discriminator_loss(student: Tensor, real: Tensor) -> Tensor:
        """`softplus(logit of the student's) + softplus(-logit of the real)`, means over `[B]`."""
        return softplus(student).mean() + softplus(-real).mean()

    @staticmethod
    def generator_loss(student: Tensor) -> Tensor:
        """`softplus(-logit)`, mean over `[B]`."""
        return softplus(-student).mean()


def build_head(width: int, seed: int) -> DiscriminatorHead:
    """A new head, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return DiscriminatorHead(width)
