"""What a reward says of itself, or what holds where it says nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from rats_video.types import LatentScorer, Reward


def is_differentiable(reward: Reward | LatentScorer) -> bool:
    """Whether gradient reaches the frames from the scores: yes, unless it says otherwise."""
    return bool(getattr(reward, "differentiable", True))


def frames_seen(reward: Reward | LatentScorer, num_frames: int) -> Tensor:
    """Indices of the frames it looks at, or may look at: all, unless it says otherwise."""
    looks_at = getattr(reward, "looks_at", None)
    return torch.arange(num_frames) if looks_at is None else torch.as_tensor(looks_at(num_frames)).cpu()


def frames_seen_for(reward: Reward | LatentScorer, prompt: str, num_frames: int) -> Tensor:
    """Those of a clip of that prompt, where a reward chooses by it."""
    looks_at_for = getattr(reward, "looks_at_for", None)
    return (
        frames_seen(reward, num_frames) if looks_at_for is None else torch.as_tensor(looks_at_for(prompt, num_frames))
    )
