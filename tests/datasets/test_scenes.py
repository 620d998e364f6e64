"""Cuts: what is one, what is none, on made clips."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from rats_video.datasets.video.scenes import Frames, find_cuts, find_scenes

SHAPE, WINDOW, THRESHOLD = (48, 80), 5, 0.3


def world(seed: int, width: int = 80) -> Frames:
    """A picture of coloured blocks, wide enough to pan over."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, width // 8, 3))
    return np.kron(blocks, np.ones((8, 8, 1), int)).astype(np.uint8)


def still(seed: int, count: int, *, noise: int = 4) -> list[Frames]:
    """A scene that shows grain alone."""
    grain = np.random.default_rng(seed + 100).integers(-noise, noise + 1, (count, *SHAPE, 3))
    return list((world(seed) + grain).clip(0, 255).astype(np.uint8))


def pan(seed: int, count: int, pixels: int) -> list[Frames]:
    wide = world(seed, 80 + 8 * ((count * pixels + 7) // 8))
    return [wide[:, i * pixels : i * pixels + 80] for i in range(count)]


def fade(count: int, to: Frames) -> list[Frames]:
    share = np.linspace(0, 1, count)[:, None, None, None]
    return list(((1 - share) * world(1) + share * to).astype(np.uint8))


BLACK = np.zeros((*SHAPE, 3), np.uint8)
WHITE = [np.full((*SHAPE, 3), 255, np.uint8)]
CASES = {
    "none": (still(1, 20), []),
    "one": (still(1, 12) + still(2, 12), [12]),
    "two": (still(1, 10) + still(2, 10) + still(3, 10), [10, 20]),
    "near the ends": (still(1, 2) + still(2, 12) + still(3, 2), [2, 14]),
    "between moving scenes": (pan(1, 12, 3) + pan(2, 12, 3), [12]),
    "flash": (still(1, 10) + WHITE * 2 + still(1, 10), []),
    "lightning": (still(1, 8) + WHITE + still(1, 3) + WHITE * 2 + still(1, 8), []),
    "fast pan": (pan(1, 24, 8), []),
    "whipping camera": (pan(1, 24, 24), []),
    "slow cross-fade": (still(1, 6) + fade(36, world(2)) + still(2, 6), []),
    "slow fade to black": (still(1, 6) + fade(36, BLACK), []),
    "shorter than the window": (still(1, 10) + still(2, 3) + still(1, 10), []),
}


@pytest.mark.parametrize(("frames", "cuts"), CASES.values(), ids=CASES)
def test_cuts(frames: list[Frames], cuts: list[int]) -> None:
    assert find_cuts(frames, THRESHOLD, WINDOW) == cuts


def test_higher_threshold_sees_less() -> None:
    half = [np.concatenate([a[:, :40], b[:, 40:]], axis=1) for a, b in zip(still(1, 10), still(2, 10), strict=True)]
    frames = still(1, 10) + half  # 4 of the 9 parts of the picture, and half of others, change
    assert find_cuts(frames, 0.3, WINDOW) == [10]
    assert find_cuts(frames, 0.7, WINDOW) == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_frames(count: int) -> None:
    assert find_cuts(still(1, count), THRESHOLD, WINDOW) == []


def test_picture_of_a_few_pixels() -> None:
    frames = [np.zeros((1, 2, 3), np.uint8)] * 3 + [np.full((1, 2, 3), 255, np.uint8)] * 3
    assert find_cuts(frames, THRESHOLD, WINDOW) == [3]


def test_scenes_are_read_bit_by_bit_from_within_the_video() -> None:
    frames = np.stack(still(1, 40) + still(2, 40) + still(3, 40))
    asked: list[Sequence[int]] = []

    def read(indices: Sequence[int]) -> Frames:
        asked.append(indices)
        return frames[list(indices)]

    video = SimpleNamespace(height=48, width=80, fps=25.0, frames=read)
    assert find_scenes(video, 10, 110, THRESHOLD) == [range(10, 40), range(40, 80), range(80, 110)]
    assert [index for indices in asked for index in indices] == list(range(10, 110))
    assert max(map(len, asked)) <= 64


def test_large_frames_are_read_one_by_one() -> None:
    asked: list[int] = []

    def read(indices: Sequence[int]) -> Frames:
        asked.append(len(indices))
        return np.zeros((len(indices), 48, 80, 3), np.uint8)

    video = SimpleNamespace(height=4320, width=7680, fps=0.0, frames=read)  # no rate is known
    assert find_scenes(video, 0, 3, THRESHOLD) == [range(3)]
    assert asked == [1, 1, 1]
