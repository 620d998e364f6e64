"""Pixels as image encoders take them: numbers by the original code, at sizes whose margins are odd."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rats_video.rewards.pixels import clip_pixels, processor_pixels, resize_bicubic, rounded
from rats_video.rewards.viclip import internvid_pixels, vbench_pixels

PLACES = ((0, 0, 0), (1, 100, 31), (2, 223, 223), (0, 111, 112))  # colour, row and column of the result
# By torchvision 0.28: `_transform` of github openai/CLIP d05afc4 (clip/clip.py) on PIL images; `clip_transform` of
# Vchitect/VBench 45e79ec (vbench/utils.py) and `test_transform` of OpenGVLab/InternVideo 3965eef
# (InternVideo1/Pretrain/ViCLIP/dataset/__init__.py) on tensors of bytes.
KNOWN = {
    (480, 848): ([-1.73387, 1.77473, -1.02518, 0.14933], [-1.74847, 1.77473, -0.98252, 0.14933],
                 [-2.0494, -0.60014, 1.97769, 0.15969]),
    (544, 960): ([-1.71927, 0.42403, 0.90875, -0.33242], [-1.73387, 0.42403, 0.89453, -0.33242],
                 [-2.03228, 0.76541, 0.3742, -0.40543]),
    (704, 1280): ([-1.67548, 0.46905, 1.70508, 0.33911], [-1.67548, 0.45404, 1.56287, 0.32451],
                  [-1.98091, 0.22269, -0.63669, 0.38231]),
    (320, 576): ([-1.76307, -0.28134, 2.10324, -0.5222], [-1.77766, -0.28134, 2.1459, -0.5222],
                 [-2.08365, 0.53782, 0.00819, -0.62805]),
    (300, 500): ([-1.77766, 1.1444, 0.75233, -1.52949], [-1.77766, 1.12939, 0.76655, -1.54409],
                 [-2.10078, -0.40756, 2.27399, -1.80966]),
    (848, 480): ([-1.66088, -0.56648, -0.25729, 0.3829], [-1.54409, -0.56648, -0.22885, 0.3683],
                 [-1.94666, -0.65266, 0.26963, 0.19394]),
}  # fmt: skip
STEP = 0.0176  # 1/255 in ImageNet's and CLIP's standard deviations, where a half may be rounded either way


def slopes(height: int, width: int) -> Tensor:
    """A frame `[1, 3, height, width]` of bytes / 255 that rises with the row, the column and both."""
    y, x = torch.arange(height).view(-1, 1), torch.arange(width)
    return torch.stack([7 * y + 0 * x, 0 * y + 5 * x, 3 * y + 11 * x])[None] % 256 / 255


def at_places(pixels: Tensor) -> list[float]:
    return [pixels[0, colour, row, column].item() for colour, row, column in PLACES]


@pytest.mark.parametrize("size", KNOWN)
def test_pixels_are_the_originals(size: tuple[int, int]) -> None:
    frame = slopes(*size)
    openai, vbench, internvid = KNOWN[size]
    # PIL rounds to whole steps of 1/255 after each of its two passes.
    assert at_places(clip_pixels(frame, 224)) == pytest.approx(openai, abs=2 * STEP)
    assert at_places(vbench_pixels(frame, 224)) == pytest.approx(vbench, abs=STEP)
    assert at_places(internvid_pixels(frame, 224)) == pytest.approx(internvid, abs=STEP)


def differ(size: tuple[int, int], one: Sequence[float]) -> bool:
    return at_places(processor_pixels(slopes(*size), 224)) != pytest.approx(one, abs=0.1)


def test_processor_crops_elsewhere_where_half_a_margin_rounds_up() -> None:
    assert [size for size, (openai, _, _) in KNOWN.items() if differ(size, openai)] == [
        (480, 848), (544, 960), (704, 1280), (320, 576), (848, 480),
    ]  # fmt: skip


@pytest.mark.parametrize(("height", "width", "known"), [(480, 848, [2, 225, 144, 87]), (704, 1280, [4, 84, 94, 96])])
def test_video_rewards_frames_are_the_originals(height: int, width: int, known: list[int]) -> None:
    """By `fetch_video` of github KwaiVGI/VideoAlign 219ab9d (vision_process.py), before it normalises."""
    frames = rounded(resize_bicubic(slopes(height, width), (336, 588)))
    assert [255 * value for value in at_places(frames)] == pytest.approx(known, abs=1e-3)


def test_rounding_passes_gradient() -> None:
    frames = torch.tensor([0.1, 0.5, 1.0], requires_grad=True)
    whole = rounded(frames)
    assert (whole * 255).tolist() == pytest.approx([26, 128, 255], abs=1e-4)
    assert torch.autograd.grad(whole.sum(), frames)[0].tolist() == [1, 1, 1]
