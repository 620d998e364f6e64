"""The temporal measures of VBench (arXiv 2311.17982): motion and colours of clips, without any network.

Each is a differentiable function of videos `[B, T, 3, height, width]` in [0, 1], and a reward. Scores are one a clip,
`[B]`, the mean over frames, pairs or threes of them, and one a frame, `[B, T]`, the mean over those it is part of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rats_video.config.fields import PositiveFloat
from rats_video.errors import UserError
from rats_video.rewards.base import BaseRewardConfig, RewardContext
from rats_video.rewards.motion import explained, half_motion, shrunk, softened, warped
from rats_video.types import RewardScores

_FASTEST = 0.05  # share of the pixels whose motion counts, as in VBench
_CHUNK = 8  # pairs of frames worked on at a time
_KNEE = 0.1  # of the limit: over how much of it a score bends


class TemporalRewardConfig(BaseRewardConfig):
    """A temporal measure: computed from pixels, whatever the prompt."""

    per = "frame"
    source = "no weights"
    folders = ()

    @abstractmethod
    def measure(self, videos: Tensor) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1], higher is better; raises UserError for too short clips."""

    def build(self, context: RewardContext) -> TemporalReward:  # noqa: ARG002
        """The measure as a reward."""
        return TemporalReward(self)

    def on_meta(self, context: RewardContext) -> TemporalReward:
        """The same: it has no weights."""
        return self.build(context)


class FlickerConfig(TemporalRewardConfig):
    """Steadiness: 1 - mean change to the next frame, 0.9 to 1; motion costs too: never alone. Prompts are not read."""

    kind: Literal["flicker"]

    def measure(self, videos: Tensor) -> RewardScores:
        """See `flicker`."""
        return flicker(videos)


class MotionSmoothnessConfig(TemporalRewardConfig):
    """How well frames follow from their neighbours along the motion: about 0.95 to 1. Prompts are not read."""

    kind: Literal["motion_smoothness"]

    def measure(self, videos: Tensor) -> RewardScores:
        """See `motion_smoothness`."""
        return motion_smoothness(videos)


class DynamicDegreeConfig(TemporalRewardConfig):
    """Motion from frame to frame, as a share of the shorter side: 0 is still, 0.02 lively. Prompts are not read."""

    kind: Literal["dynamic_degree"]
    at_most: PositiveFloat | None = Field(None, description="motion beyond which more is no better; null = no end")

    def measure(self, videos: Tensor) -> RewardScores:
        """See `dynamic_degree`; bounded by the limit."""
        scores = dynamic_degree(videos)
        return scores if self.at_most is None else _changed(scores, partial(bounded, limit=self.at_most))


class SaturationConfig(TemporalRewardConfig):
    """Penalty on colours stronger than `at_most`: 0 or below; the teacher's are the measure. Prompts are not read."""

    kind: Literal["saturation"]
    at_most: PositiveFloat = Field(description="mean chroma, 0 gray to 1 pure, beyond which more costs")

    def measure(self, videos: Tensor) -> RewardScores:
        """Saturation beyond the limit, as a penalty."""
        return _changed(saturation(videos), lambda chroma: bounded(chroma, self.at_most) - chroma)


TemporalConfig = FlickerConfig | MotionSmoothnessConfig | DynamicDegreeConfig | SaturationConfig


@dataclass(frozen=True)
class TemporalReward:
    """The measure that a configuration names."""

    cfg: TemporalRewardConfig

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:  # noqa: ARG002  # not read
        """Score `[B, T, 3, height, width]` in [0, 1]; raises UserError for clips too short to move."""
        return self.cfg.measure(videos)


def bounded(scores: Tensor, limit: float) -> Tensor:
    """Scores up to a limit: `min(scores, limit)` with a soft knee, so that some gradient is left on either side.

    `limit - k * log(1 + exp((limit - scores) / k))` with k a tenth of the limit: at the limit 0.93 of it.
    """
    knee = _KNEE * limit
    return limit - knee * F.softplus((limit - scores) / knee)


def _changed(scores: RewardScores, change: Callable[[Tensor], Tensor]) -> RewardScores:
    return RewardScores(change(scores.clip), None if scores.frames is None else change(scores.frames))


def flicker(videos: Tensor) -> RewardScores:
    """Steadiness, in [0, 1], higher is better: 1 - mean |frame - next frame|, so 1 is a still clip.

    VBench's temporal flickering, (255 - mean absolute difference) / 255, without the rounding to whole steps of 1/255.
    VBench asks for it on still scenes only, for motion counts as flicker: compare clips that move alike, and never
    maximise it alone, or clips freeze.
    """
    _check_length(videos, 2)
    return _together(1 - videos.diff(dim=1).abs().mean(dim=(2, 3, 4)), 2)


def motion_smoothness(videos: Tensor) -> RewardScores:
    """Predictability of each frame from its two neighbours, in [0, 1], higher is better: 1 - mean |frame - foretold|.

    The frame foretold is the mean of both neighbours, each brought half-way along the motion between them
    (`half_motion`, which does not see the frame itself). Even motion scores about 1 whatever its speed; jitter, dropped
    or repeated frames and flicker score less. So does motion too fast to follow, more than about a tenth of the frame
    from neighbour to neighbour.

    VBench's motion smoothness is the same with the interpolation of AMT, a network, for every other frame. As there, a
    still clip scores 1. Ours sees details down to 1/128 of the long side.
    """
    _check_length(videos, 3)
    small = shrunk(videos)
    errors = in_chunks(_foretelling_error, _CHUNK, small[:, :-2], small[:, 1:-1], small[:, 2:])
    return _together(1 - errors, 3)


def dynamic_degree(videos: Tensor) -> RewardScores:
    """Length of motion from one frame to the next, as a share of the frame's shorter side; 0 is a still clip.

    Per pair of neighbours the mean length of the 5% longest motions, each times the share of the change around it that
    it explains (`half_motion`, `explained`): so neither brightness that comes and goes nor noise counts for much. More
    is not better without bound: as a reward it wants `at_most`.

    VBench's dynamic degree takes the same 5% of RAFT's optical flow, and calls a clip dynamic if in a quarter of its
    pairs, at 8 frames a second, they exceed 6/256 = 0.023 of the shorter side. Ours is that length itself. Where the
    true motion is known, of 0.01 to 0.08 a frame, it reads 0.7 to 1.3 of a moving disc's, and 0.5 to 1.7 of the whole
    frame's: too little where all is smooth and slow (below 0.01 even less), too much where large areas are flat, since
    the longest of many estimates count. So near the threshold VBench's verdict may be another one.
    """
    _check_length(videos, 2)
    small = shrunk(videos)
    return _together(in_chunks(_longest_motion, _CHUNK, small[:, :-1], small[:, 1:]), 2)


def saturation(videos: Tensor) -> RewardScores:
    """Strength of colour, in [0, 1]: mean of max(red, green, blue) - min(red, green, blue); 0 is gray, 1 pure colour.

    The chroma of the HSV hexcone (Smith 1978), which unlike HSV's own saturation is not noisy in the dark. No dimension
    of VBench: a reward that is hacked often drives it up, so what counts is its distance from the teacher's.
    """
    frames = (videos.amax(dim=2) - videos.amin(dim=2)).mean(dim=(2, 3))
    return RewardScores(frames.mean(dim=1), frames)


def contrast(videos: Tensor) -> RewardScores:
    """Root-mean-square contrast (Peli 1990), in [0, 0.5]: the standard deviation of luma (BT.601) over each frame.

    Like saturation to be held against the teacher's. Its slope has no bound at a plain frame: a monitor, not a reward.
    """
    luma = torch.einsum("btchw,c->bthw", videos, videos.new_tensor([0.299, 0.587, 0.114]))
    frames = luma.std(dim=(2, 3), correction=0)
    return RewardScores(frames.mean(dim=1), frames)


def clipped(videos: Tensor) -> RewardScores:
    """Share of colour values at either end of the range, within 1/255 of 0 or 1. It counts, so it has no gradient."""
    frames = ((videos <= 1 / 255) | (videos >= 254 / 255)).to(videos).mean(dim=(2, 3, 4))
    return RewardScores(frames.mean(dim=1), frames)


def _foretelling_error(before: Tensor, frame: Tensor, after: Tensor) -> Tensor:
    motion = half_motion(softened(before), softened(after))
    foretold = (warped(before, -motion) + warped(after, motion)) / 2
    return (frame - foretold).abs().mean(dim=(1, 2, 3))


def _longest_motion(frame: Tensor, after: Tensor) -> Tensor:
    frame, after = softened(frame), softened(after)
    motion = half_motion(frame, after)
    # The root's slope has no bound at zero: the offset keeps the gradient finite where nothing moves.
    lengths = 2 * ((motion.square().sum(dim=1) + 1e-8).sqrt() - 1e-4) * explained(frame, after, motion)[:, 0]
    fastest = max(1, round(_FASTEST * lengths[0].numel()))
    return lengths.flatten(1).topk(fastest, dim=1).values.mean(dim=1) / min(frame.shape[-2:])


def in_chunks(function: Callable[..., Tensor], chunk: int, *videos: Tensor) -> Tensor:
    """`function` of aligned frames `[N, 3, height, width]`, for videos `[B, T, ...]`: `[B, T, ...]`.

    It is given `chunk` frames at a time, recomputed in backward, so memory does not grow with their number.
    """
    frames = [part.flatten(0, 1).split(chunk) for part in videos]
    recompute = torch.is_grad_enabled() and videos[0].requires_grad
    parts = [
        checkpoint(function, *chunk, use_reentrant=False) if recompute else function(*chunk)
        for chunk in zip(*frames, strict=True)
    ]
    together: Tensor = torch.cat(parts).unflatten(0, videos[0].shape[:2])
    return together


def _together(groups: Tensor, size: int) -> RewardScores:
    """Scores of each `size` successive frames, `[B, T + 1 - size]`, brought to clips and to the frames in them."""
    count = groups.shape[1] + size - 1
    index = torch.arange(count, device=groups.device)
    start = torch.arange(groups.shape[1], device=groups.device)
    member = ((index[:, None] >= start) & (index[:, None] < start + size)).to(groups)
    return RewardScores(groups.mean(dim=1), groups @ (member / member.sum(dim=1, keepdim=True)).T)


def _check_length(videos: Tensor, least: int) -> None:
    if videos.shape[1] < least:
        raise UserError(f"clips of {videos.shape[1]} frames have no motion to measure", fix=f"at least {least} frames")
