"""Pixels for Qwen2-VL: sizes, patches and pairs as transformers' own processor makes them, with gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen import CLIP, IMAGE, processed, steps
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from rats_video.rewards.qwen_vision import PixelRule, patch_rows, smart_resize
from rats_video.seeds import seeded

pytestmark = pytest.mark.pipeline

SMALL = PixelRule(2 * 28 * 28, 8 * 28 * 28)


@pytest.mark.parametrize(
    ("size", "made"),
    [
        ((480, 832), (336, 588)),
        ((720, 1280), (336, 588)),
        ((64, 64), (336, 336)),
        ((256, 256), (336, 336)),
        ((512, 704), (364, 504)),
        ((480, 480), (448, 448)),
    ],
)
def test_frame_sizes_of_video_reward(size: tuple[int, int], made: tuple[int, int]) -> None:
    assert smart_resize(*size, CLIP) == made


@given(st.integers(28, 2000), st.integers(28, 2000), st.sampled_from([CLIP, IMAGE, SMALL]))
def test_frame_sizes_are_transformers_own(height: int, width: int, rule: PixelRule) -> None:
    wanted = reference(height, width, factor=28, min_pixels=rule.least, max_pixels=rule.most)
    assert smart_resize(height, width, rule) == wanted


@pytest.mark.parametrize(("height", "width", "atol"), [(56, 84, 1e-6), (64, 96, 0.03), (90, 50, 0.03), (20, 27, 0.03)])
def test_rows_of_an_image_are_transformers_own(height: int, width: int, atol: float) -> None:
    clips = steps(2, 1, height, width)
    rows, grid = patch_rows(clips, SMALL)
    wanted, grids = processed(clips[:, 0], SMALL)
    assert grids.tolist() == [list(grid)] * 2
    # PIL rounds to whole steps after each of its two passes: 1/255 is 0.015 of CLIP's standard deviations.
    torch.testing.assert_close(rows, wanted.flatten(0, 1).flatten(1), atol=atol, rtol=0)


@pytest.mark.parametrize("num_frames", [4, 5])
def test_rows_of_a_clip_are_pairs_of_frames(num_frames: int) -> None:
    clips = steps(2, num_frames, 56, 84)
    rows, grid = patch_rows(clips, SMALL)
    assert grid == ((num_frames + 1) // 2, 4, 6)
    frames = processed(clips.flatten(0, 1), SMALL)[0].unflatten(0, (2, num_frames))[:, :, :, :, 0]
    first, second = frames[:, ::2], frames[:, 1::2]
    if num_frames % 2:  # the last frame has no partner but itself
        second = torch.cat([second, frames[:, -1:]], dim=1)
    torch.testing.assert_close(rows, torch.stack([first, second], dim=4).flatten(0, 2).flatten(1), atol=1e-6, rtol=0)


def test_gradient_is_that_of_finite_differences() -> None:
    clips = (0.25 + 0.5 * torch.rand(1, 3, 3, 40, 52, generator=seeded(2))).requires_grad_()
    weights = torch.randn(2 * 4 * 6, 1176, generator=seeded(3))
    direction = torch.randn(clips.shape, generator=seeded(4))

    def value(pixels: Tensor) -> Tensor:
        rows, grid = patch_rows(pixels, PixelRule(4 * 28 * 28, 4 * 28 * 28))
        assert grid == (2, 4, 6)
        return (rows * weights).sum()

    (gradient,) = torch.autograd.grad(value(clips), clips)
    assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).all()
    with torch.no_grad():  # rows are linear in pixels: the step may be large
        difference = (value(clips + 0.01 * direction) - value(clips - 0.01 * direction)) / 0.02
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-3)


def test_rounding_gives_whole_steps_and_lets_gradient_pass() -> None:
    clips = torch.rand(1, 2, 3, 50, 60, generator=seeded(5)).requires_grad_()
    (plain, _), (rounded, _) = patch_rows(clips, SMALL), patch_rows(clips, replace(SMALL, rounded=True))
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    levels = (rounded.unflatten(1, (3, -1)) * std[:, None] + mean[:, None]) * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert (rounded - plain).abs().max() > 1e-3
    gradients = [torch.autograd.grad(rows.square().sum(), clips)[0] for rows in (plain, rounded)]
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.3, rtol=0.1)
    assert gradients[1].abs().mean() > 1


def test_overshoot_of_the_resize_is_clamped_and_keeps_its_gradient() -> None:
    clips = (torch.arange(96) % 24 < 12).float().expand(1, 1, 3, 84, 96).clone().requires_grad_()
    rows, _ = patch_rows(clips, PixelRule(2 * 28 * 28, 4 * 28 * 28))
    assert rows.max().item() == pytest.approx((1 - 0.40821073) / 0.27577711, abs=1e-3)  # white in the blue channel
    (gradient,) = torch.autograd.grad(rows.sum(), clips)
    assert gradient[..., 30:50, 30:60].abs().min() > 0.1
