"""What a reward says of itself, or what holds where it says nothing."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from rats_video.config.fields import Config
from rats_video.types import LatentScorer, Reward


class RewardKindConfig(Config):
    """What `rats-video rewards list` tells of a kind; the first line of its docstring says what it scores.

    Attributes:
        per: what one score is given to.
        source: where its weights come from.
        folders: the keys that name folders of weights.
    """

    per: ClassVar[Literal["frame", "clip"]]
    source: ClassVar[str]
    folders: ClassVar[tuple[str, ...]] = ("path",)


class BaseRewardConfig(RewardKindConfig):
    """One that ships with the package.

    Attributes:
        differentiable: whether gradient reaches the pixels; otherwise it cannot be a direct loss.
    """

    differentiable: ClassVar[bool] = True


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
