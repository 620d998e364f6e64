"""Shapes that move along a given path: drawn, asked for in prompts, and measured from pixels.

The path is that of the shape's centroid, relative to the size of the picture. A drawn path goes where its caption says,
at the caption's pace, and sways to the sides: captions alone do not tell where it begins nor how it sways.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from rats_video.datasets.shapes.measure import read_paths
from rats_video.datasets.shapes.render import (
    DIRECTIONS,
    RADIUS,
    SHAPES_CLIP,
    SPEEDS,
    TRIANGLE_DROP,
    ShapeAttributes,
    draw,
)
from rats_video.errors import UserError
from rats_video.motion_path import MotionPath, join_path, mean_distance, resample, split_path
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

NUM_POINTS = 5  # of a drawn path: one a latent frame of a clip of 17 frames
SWAY = 7.0  # pixels of a 64-pixel-wide clip, at most, of each of two waves
ON_PATH = 1 / 16  # of the width: how far a shape that is on its path may be off it
_SEED = 20260312
_MARGIN = 1.25 * RADIUS[1]  # pixels that a centroid keeps from the edges


def draw_path(attributes: ShapeAttributes, generator: Generator) -> MotionPath:
    """A random smooth path of `NUM_POINTS` points, rounded as prompts hold them."""
    width = SHAPES_CLIP.width
    pace, first, second, *place = torch.rand(5, generator=generator).tolist()
    slow, fast = SPEEDS[attributes.speed]
    travel = (slow + pace * (fast - slow)) * (SHAPES_CLIP.num_frames - 1)
    along = torch.tensor(DIRECTIONS[attributes.direction])
    progress = torch.linspace(0, 1, NUM_POINTS)[:, None]
    sway = (2 * first - 1) * (progress * math.pi).sin() + (2 * second - 1) * (progress * 2 * math.pi).sin()
    path = travel * progress * along + SWAY * sway * along.flip(0)
    low, high = _MARGIN - path.amin(0), width - _MARGIN - path.amax(0)
    path = path + low + torch.tensor(place) * (high - low).clamp(min=0)
    return tuple((round(x / width, 2), round(y / width, 2)) for x, y in path.tolist())


def prompts_with_paths(combinations: Sequence[ShapeAttributes], count: int) -> tuple[str, ...]:
    """`count` prompts a combination, each with a path of its own; all combinations once, then all again."""
    return tuple(
        join_path(attributes.prompt, draw_path(attributes, _generator(attributes, turn)))
        for turn in range(count)
        for attributes in combinations
    )


def _generator(attributes: ShapeAttributes, turn: int) -> Generator:
    return seeded(_SEED, turn, *attributes.prompt.encode())


def render_paths(
    attributes: Sequence[ShapeAttributes],
    paths: Sequence[MotionPath],
    clip: ClipSpec,
    generator: Generator,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render clips `[B, T, 3, height, width]` in [0, 1] along B paths; the shapes' sizes are random."""
    scale = min(clip.height, clip.width) / SHAPES_CLIP.width
    radius = (RADIUS[0] + torch.rand(len(paths), generator=generator) * (RADIUS[1] - RADIUS[0])) * scale
    centre = _positions(paths, clip.num_frames) * torch.tensor([clip.width, clip.height])
    drop = torch.tensor([TRIANGLE_DROP if a.shape == "triangle" else 0.0 for a in attributes]) * radius
    centre[..., 1] -= drop[:, None]
    return draw(attributes, centre.to(device), radius.to(device), clip)


def measure_paths(videos: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Measures how well clips `[B, T, 3, height, width]` follow their prompts' paths, read from pixels.

    Returns:
        `path_distance` `[B]`, the mean distance of asked and made path in widths of the clip, over the frames in which
        the shape is seen, NaN where it never is; and `on_path` `[B]`, the share of all frames in which it is seen and
        no more than `ON_PATH` off.

    Raises:
        UserError: a prompt has no path.
    """
    made, seen = read_paths(videos)
    asked = _positions([_path_of(prompt) for prompt in prompts], videos.shape[1]).to(made)
    height, width = videos.shape[-2:]
    stretch = made.new_tensor([1.0, height / width])
    near = ((made - asked) * stretch).norm(dim=-1) <= ON_PATH
    return {
        "path_distance": mean_distance(made * stretch, asked * stretch, seen),
        "on_path": (near & seen).float().mean(1),
    }


def _path_of(prompt: str) -> MotionPath:
    path = split_path(prompt)[1]
    if path is None:
        raise UserError(f"has no motion path: {prompt!r}", where="prompt", fix="add one: CAPTION @ x,y x,y ...")
    return path


def _positions(paths: Sequence[MotionPath], num_frames: int) -> Tensor:
    return torch.stack([resample(path, num_frames) for path in paths])
