"""Scores of a sampler's latents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rats_video.timing import phase
from rats_video.types import Backbone, LatentScorer, Reward, RewardScores


@phase("reward")
def score_clips(
    reward: Reward, backbone: Backbone, latents: Tensor, prompts: Sequence[str], grad_frames: range | None = None
) -> RewardScores:
    """Scores of clean latents `[B, C, F, H, W]`: of the decoded pixels, or directly by a reward that needs none."""
    if isinstance(reward, LatentScorer):
        return reward.score_latents(latents, prompts)
    return reward(backbone.decode(latents, grad_frames), prompts)
