"""A discriminator on the fake score's features: tells the student's clips, noised, from real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rats_video.config.dmd2 import GanConfig
from rats_video.types import TextCondition


class Head(nn.Module):
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
        see: one call of the fake score that gives its velocity and its features.
        head: what learns here; the features learn along, as part of the fake score.
        cfg: weights of the losses.
    """

    see: Callable[[Tensor, Tensor, TextCondition], tuple[Tensor, Tensor]]
    head: Head
    cfg: GanConfig

    def __call__(self, latents: Tensor, sigma: Tensor, text: TextCondition) -> tuple[Tensor, Tensor]:
        """The fake score's velocity `[B, C, F, H, W]` and the logit `[B]`, of one evaluation a clip."""
        velocity, features = self.see(latents, sigma, text)
        return velocity, self.head(features)

    @staticmethod
    def own_loss(student: Tensor, real: Tensor) -> Tensor:
        """`softplus(logit of the student's) + softplus(-logit of the real)`, means over `[B]`."""
        return softplus(student).mean() + softplus(-real).mean()

    @staticmethod
    def student_loss(student: Tensor) -> Tensor:
        """`softplus(-logit)`, mean over `[B]`."""
        return softplus(-student).mean()


def build_head(width: int, seed: int) -> Head:
    """A new head, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Head(width)
