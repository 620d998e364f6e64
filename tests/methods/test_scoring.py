"""Clips with pixels that are not finite: no reward sees them, and their scores are NaN."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rats_video.methods.scoring import score_pixels
from rats_video.rewards.temporal import DynamicDegreeConfig, MotionSmoothnessConfig, TemporalReward
from rats_video.seeds import seeded
from rats_video.types import RewardScores

PROMPTS = ["a", "b", "c"]


def clips(odd: float) -> Tensor:
    videos = torch.rand(3, 4, 3, 32, 32, generator=seeded(0))
    videos[1, 2, 0, 5, 6] = odd
    return videos.requires_grad_()


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_reward_sees_finite_pixels_and_the_clip_scores_nan(odd: float) -> None:
    seen: list[Tensor] = []

    def reward(videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        seen.append(videos)
        frames = videos.mean(dim=(2, 3, 4))
        return RewardScores(frames.mean(dim=1), frames, {"part": frames[:, 0] * len(prompts)})

    videos = clips(odd)
    scores = score_pixels(reward, videos, PROMPTS)
    assert seen[0].isfinite().all()
    assert torch.equal(seen[0][::2], videos[::2])
    assert scores.frames is not None
    for values in (scores.clip, scores.frames, scores.parts["part"]):
        assert values[1].isnan().all()
    assert torch.equal(scores.clip[::2], reward(videos[::2], PROMPTS[::2]).clip)
    (gradient,) = torch.autograd.grad(scores.clip[::2].sum(), videos)
    assert gradient.isfinite().all()
    assert not gradient[1].any()
    assert gradient[::2].all()


def test_finite_clips_are_handed_on_as_they_are() -> None:
    videos = clips(0.5)
    scores = score_pixels(lambda given, _: RewardScores(torch.full((3,), float(given is videos))), videos, PROMPTS)
    assert scores.clip.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "cfg", [MotionSmoothnessConfig(kind="motion_smoothness"), DynamicDegreeConfig(kind="dynamic_degree")]
)
def test_motion_of_broken_frames_does_not_end_the_process(cfg: MotionSmoothnessConfig | DynamicDegreeConfig) -> None:
    """Neither through `score_pixels` nor called directly: torch's `grid_sample` would, in its backward at NaN."""
    videos, whole = clips(float("nan")), clips(0.5)
    direct, scores = cfg.measure(videos), score_pixels(TemporalReward(cfg), videos, PROMPTS)
    wanted = cfg.measure(whole).clip
    for each in (direct, scores):
        assert each.clip.isfinite().tolist() == [True, False, True]
        assert torch.equal(each.clip[::2], wanted[::2])
        masked = torch.where(each.clip.isfinite(), each.clip, 0.0)
        assert torch.autograd.grad(masked.sum(), videos)[0][::2].isfinite().all()
