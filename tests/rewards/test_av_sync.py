"""Synchrony of flashes and clicks: together, late, silent, still; and its gradient to both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.errors import UserError
from rats_video.rewards.av_sync import AvSyncReward, av_align, av_sync
from rats_video.rewards.self_test import self_test
from rats_video.seeds import seeded
from rats_video.sound import Sound
from rats_video.types import ClipSpec

FPS, FRAMES, RATE = 24, 48, 24_000
EVENTS = (5, 14, 27, 39)


def flashes(events: tuple[int, ...] = EVENTS, frames: int = FRAMES) -> Tensor:
    """A clip `[1, T, 3, 8, 8]` that lights up at each event, and fades."""
    lit = torch.zeros(frames)
    for event in events:
        lit[event : event + 5] = torch.tensor([0.8, 0.6, 0.4, 0.2, 0.1])
    return lit.view(1, -1, 1, 1, 1).expand(1, -1, 3, 8, 8) + 0.1


def clicks(late: float = 0.0, events: tuple[int, ...] = EVENTS) -> Sound:
    """A burst of 60 ms at each event, so many seconds late."""
    waves = torch.zeros(1, 1, RATE * FRAMES // FPS)
    for event in events:
        start = round((event / FPS + late) * RATE)
        burst = torch.randn(1440, generator=seeded(event)) * torch.linspace(1, 0, 1440)
        waves[0, 0, start : start + 1440] = 0.3 * burst[: max(0, waves.shape[2] - start)]
    return Sound(waves, RATE)


def test_together_is_one_and_later_is_less() -> None:
    scores = [float(av_sync(flashes(), clicks(late))) for late in (0.0, 0.04, 0.08, 0.16)]
    assert scores[0] > 0.9
    assert scores == sorted(scores, reverse=True)
    assert scores[0] - scores[1] > 0.05
    assert scores[2] < 0.5
    assert scores[3] < 0.1


def test_silence_and_a_still_clip_score_nothing() -> None:
    silent = Sound(torch.zeros_like(clicks().waves), RATE)
    assert float(av_sync(flashes(), silent)) == 0
    assert abs(float(av_sync(torch.full((1, FRAMES, 3, 8, 8), 0.5), clicks()))) < 0.01
    assert float(av_align(flashes(), silent)) == 0
    assert float(av_align(torch.full((1, FRAMES, 3, 8, 8), 0.5), clicks())) == 0


def test_av_align_counts_onsets_within_a_frame() -> None:
    assert float(av_align(flashes(), clicks())) == 1
    assert float(av_align(flashes(), clicks(0.03))) == 1
    assert float(av_align(flashes(), clicks(0.12))) == 0
    assert float(av_align(flashes(), clicks(events=EVENTS[:2]))) == 2 / 4
    assert float(av_align(flashes(EVENTS[:3]), clicks(events=(5, 14, 39)))) == 2 / 4  # two of four different ones


def test_each_clip_is_scored_on_its_own() -> None:
    videos = torch.cat([flashes(), flashes(EVENTS[::2])])
    sound = Sound(torch.cat([clicks().waves, clicks(0.2).waves]), RATE)
    alone = [av_sync(videos[i : i + 1], Sound(sound.waves[i : i + 1], RATE)) for i in range(2)]
    assert torch.allclose(av_sync(videos, sound), torch.cat(alone), atol=1e-6)


def test_gradient_brings_a_late_sound_nearer() -> None:
    """A step along the gradient of the sound raises the score; and every frame has a slope of its own."""
    waves = clicks(0.05).waves.requires_grad_()
    before = av_sync(flashes(), Sound(waves, RATE)).sum()
    (slope,) = torch.autograd.grad(before, waves)
    after = av_sync(flashes(), Sound(waves.detach() + 0.05 * slope / slope.abs().max(), RATE))
    assert float(after) > before.item() + 5e-4
    tested = self_test(AvSyncReward(0.04), ClipSpec(17, 32, 32, 24.0), ["a", "b"], where="reward")
    tested.require_loss()
    assert set(tested.scores.judged) == {"video", "audio"}


def test_two_frames_are_refused() -> None:
    with pytest.raises(UserError, match=r"clips of 2 frames have no onset to see \(at least 3 frames\)"):
        av_sync(flashes(frames=48)[:, :2], clicks())
