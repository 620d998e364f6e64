"""Damage for preference pairs: exactly the frames it says, in range, repeatable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.datasets.shapes.corruptions import CORRUPTIONS, Corruption, corrupt, ghosting, shuffle, swap
from rats_video.seeds import seeded


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """Every frame of every clip is another, with texture: no damage can go unseen."""
    return 0.2 + 0.6 * torch.rand(24, 17, 3, 32, 32, generator=seeded(0))


def changed(damaged: Tensor, clips: Tensor) -> Tensor:
    return (damaged != clips).flatten(2).any(dim=2)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.__name__)
def test_changes_exactly_the_frames_it_says(corruption: Corruption, clips: Tensor) -> None:
    for seed in range(3):
        damaged, frames = corruption(clips, clips.roll(1, dims=0), seeded(seed))
        assert (damaged.shape, frames.shape, frames.dtype) == (clips.shape, clips.shape[:2], torch.bool)
        assert damaged.min() >= 0
        assert damaged.max() <= 1
        assert torch.equal(changed(damaged, clips), frames)
        assert frames.any(dim=1).all()


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: c.__name__)
def test_is_a_function_of_the_generator(corruption: Corruption, clips: Tensor) -> None:
    before = clips.clone()
    one, again, other = (corruption(clips, clips.roll(1, dims=0), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(clips, before)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[0], other[0])


def test_swap_goes_on_with_the_other_clip(clips: Tensor) -> None:
    others = clips.roll(1, dims=0)
    damaged, frames = swap(clips, others, seeded(4))
    starts = frames.int().argmax(dim=1)
    assert starts.min() >= 2
    assert starts.max() <= 15
    for clip, start in enumerate(starts.tolist()):
        assert torch.equal(damaged[clip, :start], clips[clip, :start])
        assert torch.equal(damaged[clip, start:], others[clip, start:])
        assert frames[clip].tolist() == [False] * start + [True] * (17 - start)


def test_shuffle_keeps_every_frame_once(clips: Tensor) -> None:
    damaged, _ = shuffle(clips, clips, seeded(5))
    means = [videos.mean(dim=(2, 3, 4)).sort(dim=1).values for videos in (damaged, clips)]
    torch.testing.assert_close(*means)


def test_ghosting_blends_in_another_frame(clips: Tensor) -> None:
    damaged, frames = ghosting(clips, clips, seeded(6))
    clip, frame = frames.nonzero()[0].tolist()
    ghosts = [
        ((damaged - clips)[clip, frame] / (clips[clip, frame - shift] - clips[clip, frame])).flatten()
        for shift in range(3, 9)
    ]
    spread, strength = min((float(ghost.std()), float(ghost.median())) for ghost in ghosts)
    assert spread < 1e-2
    assert 0.2 <= strength <= 0.5


def test_corrupt_damages_every_clip_in_some_way(clips: Tensor) -> None:
    damaged, frames = corrupt(clips, seeded(7))
    assert torch.equal(changed(damaged, clips), frames)
    assert frames.any(dim=1).all()
    again, _ = corrupt(clips, seeded(7))
    assert torch.equal(damaged, again)
