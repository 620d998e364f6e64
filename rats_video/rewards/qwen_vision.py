"""Pixels as Qwen2-VL's image processor makes them, but differentiable."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from rats_video.rewards.pixels import CLIP_MEAN, CLIP_STD, normalize, resize_bicubic, rounded

PATCH = 14  # pixels a side
MERGE = 2  # patches a side that become one token
PAIR = 2  # frames a token
_FACTOR = PATCH * MERGE

Grid = tuple[int, int, int]
"""Frame pairs, rows and columns of patches of one clip."""


@dataclass(frozen=True)
class PixelRule:
    """Sizes that frames are resized to.

    Args:
        least: pixels of a frame, at least.
        most: pixels of a frame, at most.
        rounded: to whole steps of 1/255 after the resize, as the published code does; gradient passes straight through.
    """

    least: int
    most: int
    rounded: bool = False


def smart_resize(height: int, width: int, rule: PixelRule) -> tuple[int, int]:
    """Height and width in multiples of 28 that keep the shape and obey the rule (qwen-vl-utils, vision_process.py)."""

    def multiple(size: float, to_whole: Callable[[float], int] = round) -> int:
        return max(_FACTOR, to_whole(size / _FACTOR) * _FACTOR)

    sizes = multiple(height), multiple(width)
    if math.prod(sizes) > rule.most:
        shrink = math.sqrt(height * width / rule.most)
        return multiple(height / shrink, math.floor), multiple(width / shrink, math.floor)
    if math.prod(sizes) < rule.least:
        grow = math.sqrt(rule.least / (height * width))
        return multiple(height * grow, math.ceil), multiple(width * grow, math.ceil)
    return sizes


def patch_rows(clips: Tensor, rule: PixelRule) -> tuple[Tensor, Grid]:
    """Rows of pixels that Qwen2-VL's patch embedding takes, and their arrangement in each clip.

    Resize (bicubic, antialiased), CLIP's mean and standard deviation, then pairs of frames in patches of 14 x 14. The
    2 x 2 patches of one token follow one another. An odd number of frames is made even by repeating the last one.

    Args:
        clips: `[N, T, 3, height, width]` in [0, 1]; an image is a clip of one frame.
        rule: sizes that frames are resized to.

    Returns:
        `[N * pairs * rows * columns, 3 * 2 * 14 * 14]`, float32, and the grid of one clip.
    """
    height, width = clips.shape[-2:]
    frames = resize_bicubic(clips.flatten(0, 1), smart_resize(height, width, rule))
    if rule.rounded:
        frames = rounded(frames)
    frames = normalize(frames, CLIP_MEAN, CLIP_STD).unflatten(0, clips.shape[:2])
    if frames.shape[1] % PAIR:
        frames = torch.cat([frames, frames[:, -1:]], dim=1)
    grid = (frames.shape[1] // PAIR, frames.shape[-2] // PATCH, frames.shape[-1] // PATCH)
    rows = rearrange(
        frames, "b (t p) c (h m y) (w n x) -> (b t h w m n) (c p y x)", p=PAIR, m=MERGE, n=MERGE, y=PATCH, x=PATCH
    )
    return rows, grid
