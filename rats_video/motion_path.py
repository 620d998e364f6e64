"""A motion path that travels in its prompt: `a red circle moving right @ 0.20,0.50 0.45,0.40 0.70,0.50`.

After the caption and an `@` come relative positions x,y of what moves, 0,0 top left and 1,1 bottom right, at equally
spaced times from the first frame to the last; between them it moves in straight lines. So a path goes wherever a prompt
goes, and whoever knows nothing of paths takes the caption.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.errors import UserError

MARK = "@"
MOST_POINTS = 64
_POINT = re.compile(r"\d*\.?\d+,\d*\.?\d+")

MotionPath = tuple[tuple[float, float], ...]


def split_path(prompt: str) -> tuple[str, MotionPath | None]:
    """The caption, and the path where there is one.

    Raises:
        UserError: what follows the `@` is no path.
    """
    caption, mark, text = prompt.partition(MARK)
    if not mark:
        return prompt, None
    words = text.split()
    fix = f"write 'CAPTION {MARK} x,y x,y ...', each of x and y from 0 to 1"
    if wrong := [word for word in words if not is_point(word)]:
        raise UserError(f"{wrong[0]!r} is no point of a motion path", where="prompt", fix=fix)
    if not 2 <= len(words) <= MOST_POINTS:
        raise UserError(f"a motion path has 2 to {MOST_POINTS} points, not {len(words)}", where="prompt", fix=fix)
    path = tuple((float(x), float(y)) for x, y in (word.split(",") for word in words))
    if outside := [word for word, point in zip(words, path, strict=True) if max(point) > 1]:
        raise UserError(f"the point {outside[0]} lies outside the picture", where="prompt", fix=fix)
    return caption.strip(), path


def is_point(word: str) -> bool:
    """True if a word is a point of a path, wherever it lies."""
    return _POINT.fullmatch(word) is not None


def join_path(caption: str, path: MotionPath) -> str:
    """The prompt that `split_path` takes apart; positions have two decimals."""
    return f"{caption} {MARK} {' '.join(f'{x:.2f},{y:.2f}' for x, y in path)}"


def resample(path: Sequence[Sequence[float]], num: int) -> Tensor:
    """Positions `[num, 2]` at equally spaced times."""
    points = torch.tensor(path, dtype=torch.float32)
    if num == len(points):
        return points
    return F.interpolate(points.T[None], num, mode="linear", align_corners=True)[0].T


def mean_distance(one: Tensor, other: Tensor, seen: Tensor) -> Tensor:
    """Mean distance `[B]` of paths `[B, T, 2]` over the frames `[B, T]` (bool) that count; NaN where none does."""
    distance = (one - other).norm(dim=-1)
    return torch.where(seen, distance, 0).sum(1) / seen.sum(1).where(seen.any(1), math.nan)
