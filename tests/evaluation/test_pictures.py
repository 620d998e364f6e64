"""Measures of clips that start from a picture, on clips whose values are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rats_video.datasets.shapes.render import SHAPES_CLIP, SPEEDS, parse_prompt, render
from rats_video.evaluation.pictures import picture_measure
from rats_video.evaluation.sets import fill_sets
from rats_video.evaluation.sweep import ArmScores
from rats_video.inference.sampler import SamplerSpec
from rats_video.seeds import seeded

PROMPTS = ("a fast red circle moving left on a gray background", "a slow blue square moving up on a white background")


def clips() -> Tensor:
    return render([parse_prompt(prompt) for prompt in PROMPTS], SHAPES_CLIP, seeded(3))


def test_a_clip_that_keeps_to_its_picture_and_moves_as_asked() -> None:
    videos = clips()
    found = picture_measure(videos, videos[:, 0], PROMPTS)
    assert found["first_frame_psnr"].tolist() == pytest.approx([100, 100])
    for value, speed in zip(found["displacement"].tolist(), ("fast", "slow"), strict=True):
        low, high = (edge / (sum(SPEEDS[speed]) / 2) for edge in SPEEDS[speed])
        assert low - 0.05 <= value <= high + 0.05
    assert all(0 < value < 1 for value in found["picture_likeness"].tolist())


def test_a_clip_that_stands_still_is_like_its_picture_and_goes_nowhere() -> None:
    videos = clips()[:, :1].expand(-1, 17, -1, -1, -1)
    found = picture_measure(videos, videos[:, 0], PROMPTS)
    assert found["picture_likeness"].tolist() == pytest.approx([1, 1])
    assert found["displacement"].tolist() == pytest.approx([0, 0], abs=1e-3)
    backwards = picture_measure(clips().flip(1), videos[:, 0], PROMPTS)["displacement"]
    assert (backwards < -0.5).all()
    nothing = torch.full((2, 17, 3, 64, 64), 0.5)
    assert picture_measure(nothing, videos[:, 0], PROMPTS)["displacement"].tolist() == [0, 0]


def test_a_first_frame_that_differs_has_its_decibels() -> None:
    videos = torch.full((1, 2, 3, 4, 4), 0.5)
    found = picture_measure(videos, torch.full((1, 3, 4, 4), 0.6), ["a kite"])
    assert found["first_frame_psnr"].tolist() == pytest.approx([20], abs=1e-3)
    assert "displacement" not in found


def test_motion_is_a_share_of_the_teachers_where_clips_start_from_pictures() -> None:
    def arm(name: str, motion: list[float], **more: list[float]) -> ArmScores:
        return ArmScores(name, SamplerSpec(4, 3.0), ["a", "b"], [1.0] * 2, {"dynamic_degree": motion, **more})

    psnr = [30.0, 31.0]
    both = [arm("teacher", [2.0, 4.0], first_frame_psnr=psnr), arm("student", [1.0, 3.5], first_frame_psnr=psnr)]
    fill_sets(both, None)
    assert both[1].sets["dynamic_degree_share"].mean == pytest.approx(0.75)
    assert both[0].sets["dynamic_degree_share"].mean == pytest.approx(1)
    text = [arm("teacher", [2.0, 4.0]), arm("student", [1.0, 3.5])]
    fill_sets(text, None)
    assert "dynamic_degree_share" not in text[1].sets
