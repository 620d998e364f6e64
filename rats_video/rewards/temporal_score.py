"""The temporal measures as rewards: no network, no weights, no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rats_video.config.fields import PositiveFloat
from rats_video.rewards import temporal
from rats_video.rewards.base import BaseRewardConfig
from rats_video.types import RewardScores


class TemporalRewardConfig(BaseRewardConfig):
    """A temporal measure: computed from pixels, whatever the prompt."""

    per = "frame"
    source = "no weights"
    folders = ()


class FlickerConfig(TemporalRewardConfig):
    """Steadiness: 1 - mean change to the next frame, 0.9 to 1; motion costs too: never alone. Prompts are not read."""

    kind: Literal["flicker"]


class MotionSmoothnessConfig(TemporalRewardConfig):
    """How well frames follow from their neighbours along the motion: about 0.95 to 1. Prompts are not read."""

    kind: Literal["motion_smoothness"]


class DynamicDegreeConfig(TemporalRewardConfig):
    """Motion from frame to frame, as a share of the shorter side: 0 is still, 0.02 lively. Prompts are not read."""

    kind: Literal["dynamic_degree"]
    at_most: PositiveFloat | None = Field(None, description="motion beyond which more is no better; null = no end")


class SaturationConfig(TemporalRewardConfig):
    """Penalty on colours stronger than `at_most`: 0 or below; the teacher's are the measure. Prompts are not read."""

    kind: Literal["saturation"]
    at_most: PositiveFloat = Field(description="mean chroma, 0 gray to 1 pure, beyond which more costs")


TemporalConfig = FlickerConfig | MotionSmoothnessConfig | DynamicDegreeConfig | SaturationConfig


_KNEE = 0.1  # of the limit: over how much of it a score bends


class TemporalReward:
    """The measure a configuration names; higher is better, so saturation is a penalty."""

    def __init__(self, cfg: TemporalConfig) -> None:
        self.cfg = cfg

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002  # not read
        """Score `[B, T, 3, height, width]` in [0, 1]; raises UserError for clips too short to move."""
        match self.cfg:
            case FlickerConfig():
                return temporal.flicker(videos)
            case MotionSmoothnessConfig():
                return temporal.motion_smoothness(videos)
            case DynamicDegreeConfig(at_most=limit):
                scores = temporal.dynamic_degree(videos)
                return scores if limit is None else _changed(scores, partial(bounded, limit=limit))
            case SaturationConfig(at_most=limit):
                return _changed(temporal.saturation(videos), lambda chroma: bounded(chroma, limit) - chroma)


def bounded(scores: Tensor, limit: float) -> Tensor:
    """Scores up to a limit: `min(scores, limit)` with a soft knee, so that some gradient is left on either side.

    `limit - k * log(1 + exp((limit - scores) / k))` with k a tenth of the limit: at the limit 0.93 of it.
    """
    knee = _KNEE * limit
    return limit - knee * F.softplus((limit - scores) / knee)


def _changed(scores: RewardScores, change: Callable[[Tensor], Tensor]) -> RewardScores:
    return RewardScores(change(scores.clip), None if scores.frames is None else change(scores.frames))
