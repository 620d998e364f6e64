"""Clip sizes that a model cannot take are refused with those next to them that it can."""

from __future__ import annotations

import pytest

from rats_video.backbones.sizes import divide_clip
from rats_video.errors import UserError
from rats_video.types import ClipSpec


@pytest.mark.parametrize(
    ("clip", "patch", "line"),
    [
        ((80, 64, 64), (1, 2, 2), "clip.num_frames: must be 1 + a multiple of 4, got 80 (take 77 or 81)"),
        ((3, 64, 64), (1, 2, 2), "clip.num_frames: must be 1 + a multiple of 4, got 3 (take 1 or 5)"),
        (
            (1, 64, 64), (5, 2, 2),
            "clip.num_frames: 1 give 1 latent frames, which patches of 5 do not divide (take 17)",
        ),
        (
            (33, 64, 64), (5, 2, 2),
            "clip.num_frames: 33 give 9 latent frames, which patches of 5 do not divide (take 17 or 37)",
        ),
        ((17, 70, 64), (5, 2, 2), "clip.height: must be a multiple of 16, got 70 (take 64 or 80)"),
        ((17, 64, 8), (5, 2, 2), "clip.width: must be a multiple of 16, got 8 (take 16)"),
    ],
)  # fmt: skip
def test_neighbours_are_named_and_taken(clip: tuple[int, int, int], patch: tuple[int, int, int], line: str) -> None:
    with pytest.raises(UserError) as caught:
        divide_clip(ClipSpec(*clip, 8), 4, 8, patch)
    assert str(caught.value) == line
    key = caught.value.where.removeprefix("clip.")
    for number in caught.value.fix.removeprefix("take ").split(" or "):
        size = dict(zip(("num_frames", "height", "width"), clip, strict=True)) | {key: int(number)}
        assert min(divide_clip(ClipSpec(**size, fps=8), 4, 8, patch)) > 0


@pytest.mark.parametrize(
    ("side", "line"),
    [
        (32, "clip.height: must be at least 64, got 32 (take 64)"),
        (16, "clip.height: must be a multiple of 32, got 16 (take 64)"),
        (80, "clip.height: must be a multiple of 32, got 80 (take 64 or 96)"),
    ],
)
def test_a_decoder_that_needs_two_latents_a_side(side: int, line: str) -> None:
    with pytest.raises(UserError) as caught:
        divide_clip(ClipSpec(9, side, 64, 24), 8, 32, (1, 1, 1), least=2)
    assert str(caught.value) == line
    assert divide_clip(ClipSpec(9, 64, 96, 24), 8, 32, (1, 1, 1), least=2) == (2, 2, 3)
