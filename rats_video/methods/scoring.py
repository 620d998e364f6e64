"""Scores of a sampler's latents and clips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rats_video.methods.finite import mask_scores
from rats_video.timing import phase
from rats_video.types import Backbone, LatentScorer, Reward, RewardScores


@phase("reward")
def score_clips(
    reward: Reward, backbone: Backbone, latents: Tensor, prompts: Sequence[str], grad_frames: range | None = None
) -> RewardScores:
    """Scores of clean latents `[B, C, F, H, W]`: of the decoded pixels, or directly by a reward that needs none."""
    if isinstance(reward, LatentScorer):
        return reward.score_latents(latents, prompts)
    return score_pixels(reward, backbone.decode(latents, grad_frames), prompts)


def score_pixels(reward: Reward, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
    """Scores of clips `[B, T, 3, height, width]`, NaN for a clip with pixels that are not finite.

    No reward sees such pixels: what a network makes of them, and of their gradient, is not its authors' concern.
    """
    finite = videos.isfinite()
    kept = finite.flatten(1).all(dim=1)
    if bool(kept.all()):
        return reward(videos, prompts)
    return mask_scores(reward(torch.where(finite, videos, 0.0), prompts), kept, math.nan)
