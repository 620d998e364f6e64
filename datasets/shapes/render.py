"""Endless captioned clips of one moving shape, rendered analytically.

A clip shows one coloured shape gliding at constant velocity over a plain background. Its caption names every attribute,
so what a model drew can be read back from pixels (`measure`) without any learned judge.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from rats_video.errors import UserError
from rats_video.motion_path import MARK
from rats_video.types import ClipSpec

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.65, 0.10, 0.80),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[float, float]] = {  # (x, y) in image axes: y grows downwards
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
SPEEDS: dict[str, tuple[float, float]] = {
    "slow": (0.7, 0.85),
    "fast": (1.4, 1.6),
}  # pixels a frame, uniform in the range
RADIUS = (13.0, 15.0)  # pixels, uniform: half the extent of the circle; the others are drawn to a similar area
TRIANGLE_DROP = 0.3  # radii from the centre of the triangle's bounding box down to its centroid
SHAPES_CLIP = ClipSpec(num_frames=17, height=64, width=64, fps=8.0)

NUM_HELDOUT = 64
_SPLIT_SEED = 20260414


@dataclass(frozen=True)
class ShapeAttributes:
    """The five words a caption is made of."""

    speed: str
    color: str
    shape: str
    direction: str
    background: str

    @property
    def prompt(self) -> str:
        """The caption, e.g. "a fast red circle moving left on a gray background"."""
        return f"a {self.speed} {self.color} {self.shape} moving {self.direction} on a {self.background} background"


ATTRIBUTES = tuple(f.name for f in fields(ShapeAttributes))
WORDS: dict[str, tuple[str, ...]] = {
    "speed": tuple(SPEEDS),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "background": tuple(BACKGROUNDS),
}
VOCABULARY = ("a", "moving", "on", "background", *itertools.chain.from_iterable(WORDS.values()))


def parse_prompt(prompt: str) -> ShapeAttributes:
    """Read a caption back; a motion path behind it is nobody's word.

    Raises:
        UserError: the prompt is not a caption of this data set.
    """
    words = prompt.lower().partition(MARK)[0].split()
    found = {name: [word for word in words if word in choices] for name, choices in WORDS.items()}
    wrong = [name for name, hits in found.items() if len(hits) != 1]
    if not wrong:
        attributes = ShapeAttributes(**{name: hits[0] for name, hits in found.items()})
        if attributes.prompt.split() == words:
            return attributes
    raise UserError(
        f"not a caption of the shapes data: {prompt!r}",
        where="prompt",
        fix="write 'a {slow|fast} COLOR SHAPE moving DIRECTION on a {black|gray|white} background'",
    )


def split_combinations() -> tuple[list[ShapeAttributes], list[ShapeAttributes]]:
    """The fixed split of all 432 attribute combinations into (training, held-out); every word occurs in both."""
    combinations = [ShapeAttributes(*words) for words in itertools.product(*WORDS.values())]
    random.Random(_SPLIT_SEED).shuffle(combinations)
    return combinations[NUM_HELDOUT:], combinations[:NUM_HELDOUT]


def render(
    attributes: Sequence[ShapeAttributes],
    clip: ClipSpec,
    generator: Generator,
    device: torch.device | str = "cpu",
    *,
    spread: float = 1.0,
) -> Tensor:
    """Render clips `[B, T, 3, height, width]` in [0, 1]; start, speed and size within an attribute are random.

    The random numbers come from `generator` (on the CPU), so every `device` draws the same clips. `spread` is the share
    of the free room over which paths are scattered: 0 centres them all, 1 lets them touch the edges.

    Lengths are those of a 64-pixel-wide clip and scale with its width. The shape never leaves the view.
    Anti-aliasing is analytic: a pixel's coverage is its signed distance to the outline, clamped to half a pixel.
    """
    scale = min(clip.height, clip.width) / SHAPES_CLIP.width
    unit = torch.rand(len(attributes), 4, generator=generator)
    speed = torch.tensor([SPEEDS[a.speed] for a in attributes])
    speed = (speed[:, 0] + unit[:, 0] * (speed[:, 1] - speed[:, 0])) * scale
    radius = (RADIUS[0] + unit[:, 1] * (RADIUS[1] - RADIUS[0])) * scale
    travel = torch.tensor([DIRECTIONS[a.direction] for a in attributes]) * speed[:, None] * (clip.num_frames - 1)
    size = torch.tensor([float(clip.width), float(clip.height)])
    margin = radius[:, None] * 1.2
    low = margin - travel.clamp(max=0)
    high = size - margin - travel.clamp(min=0)
    start = low + (0.5 + spread * (unit[:, 2:] - 0.5)) * (high - low).clamp(min=0)

    progress = torch.linspace(0, 1, clip.num_frames)[None, :, None]
    centre = start[:, None] + progress * travel[:, None]  # [B, T, 2]
    return draw(attributes, centre.to(device), radius.to(device), clip)


def draw(attributes: Sequence[ShapeAttributes], centre: Tensor, radius: Tensor, clip: ClipSpec) -> Tensor:
    """Clips `[B, T, 3, height, width]` of shapes of radii `[B]` around centres `[B, T, 2]` (x, y), all in pixels."""
    device = centre.device
    x = torch.arange(clip.width, device=device)[None, None, None, :] + 0.5 - centre[..., 0, None, None]
    y = torch.arange(clip.height, device=device)[None, None, :, None] + 0.5 - centre[..., 1, None, None]
    distances = torch.stack(_signed_distances(x, y, radius[:, None, None, None]))
    distance = torch.stack([distances[SHAPES.index(a.shape), clip_index] for clip_index, a in enumerate(attributes)])
    coverage = (0.5 - distance).clamp(0, 1)[:, :, None]  # [B, T, 1, height, width]
    color = torch.tensor([COLORS[a.color] for a in attributes], device=device)[:, None, :, None, None]
    background = torch.tensor([BACKGROUNDS[a.background] for a in attributes], device=device)[:, None, :, None, None]
    return background + coverage * (color - background)


def _signed_distances(x: Tensor, y: Tensor, radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance in pixels to the outline of circle, square and triangle (in the order of SHAPES), negative inside."""
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - 0.89 * radius
    y = y - TRIANGLE_DROP * radius  # centre the bounding box, not the centroid, on the path
    half, cos, sin = 0.6 * radius, 3**0.5 / 2, 0.5
    triangle = torch.maximum(torch.maximum(cos * x - sin * y, -cos * x - sin * y), y.expand_as(x + y)) - half
    return circle, square, triangle
