"""Measured adherence: the five words of a shapes clip read back from its pixels, without any learned judge.

The ruler segments, then reads. A pixel belongs to the object by its distance from the border's colour, in units of the
object's own contrast, so off colours and faint ghosts do not move the outline. Shape and colour are read frame by
frame, the background pixel by pixel along the border, and a word counts only where `MIN_SHARE` of those readings agree:
a shape that morphs, a colour that swaps or an object that vanishes halfway is no word at all. Motion is a robust line
through the centroids, on which as many frames must lie. What cannot be read is `UNREADABLE` and matches no prompt.

Lengths are pixels of a 64-pixel-wide clip, as in `shapes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.datasets.shapes.render import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SHAPES_CLIP,
    SPEEDS,
    WORDS,
    parse_prompt,
)
from rats_video.datasets.shapes.segment import Scene, border_pixels, median, segment

UNREADABLE = -1
MIN_SHARE = 0.85  # of the frames (or border pixels) that must agree: 2 of 17 frames may fail
COLOR_TOLERANCE = 0.25  # RGB distance; under half the gap between any two palette colours, so no colour is two words
MIN_FIT = 0.82  # overlap (IoU) with the best ideal shape; lenient: a square on its corner overlaps a circle by 0.83
MAX_OFF_PATH = 1.5  # pixels from the straight path at which a frame still lies on it
MIN_MOTION = 0.3  # pixels a frame below which nothing moves anywhere
MIN_ALIGNMENT = 0.894  # cosine with the direction: the motion across is less than half of that along
SPEED_EDGES = (0.35, 1.1, 2.2)  # pixels a frame: slow lies between the first two, fast between the last two

WOBBLE_SCALE = 1.0  # pixels a frame^2        each scale is the defect that multiplies
FLICKER_SCALE = 0.1  # mean |RGB change|      a frame's smoothness or constancy by 1/e
COLOR_SCALE = 0.15  # RGB distance
AREA_SCALE = 0.25  # |log area ratio|
FIT_SCALE = 0.3  # IoU

_CHUNK = 4  # clips worked on at once: bounds the memory of a bulk reading, and is the fastest on a CPU


@dataclass(frozen=True)
class ShapeReadings:
    """The contents of B clips, whatever their prompts.

    Args:
        words: a `[B]` index into `WORDS[name]` for each name in `ATTRIBUTES`, `UNREADABLE` where no word holds.
        frame_words: the same frame by frame, `[B, T]`, for what a single frame can show: color and shape.
        smoothness: `[B]` in [0, 1], the mean over inner frames of exp(-wobble / 1 px - flicker / 0.1). Wobble is the
            length of the centroid's second difference; flicker the mean absolute change of the pixels outside the
            object. A frame counts 0 where it or a neighbour lacks the object. Uniform motion, and rest, score 1.
        constancy: `[B]` in [0, 1], the mean over frames of exp(-colour / 0.15 - size / 0.25 - fit / 0.3): how far the
            object's RGB, log area and overlap with the three ideal shapes are from their medians over the clip.
            A frame without the object counts 0, so this is, softly, the share of frames where the object is itself.
    """

    words: dict[str, Tensor]
    frame_words: dict[str, Tensor]
    smoothness: Tensor
    constancy: Tensor


@dataclass(frozen=True)
class ShapeMeasures:
    """Measures of how well B clips show their prompts.

    Args:
        attributes: `[B]` for each name in `ATTRIBUTES`, 1.0 where the clip shows the prompted word, else 0.0.
        adherence: `[B]` in [0, 1], the mean over the five attributes.
        smoothness: `[B]`, see `ShapeReadings`.
        constancy: `[B]`, see `ShapeReadings`.
    """

    attributes: dict[str, Tensor]
    adherence: Tensor
    smoothness: Tensor
    constancy: Tensor


def measure_shapes(videos: Tensor, prompts: Sequence[str]) -> ShapeMeasures:
    """Measure clips `[B, T, 3, height, width]` in [0, 1] against their B captions.

    Raises:
        UserError: a prompt is not a caption of the shapes data.
    """
    assert len(prompts) == len(videos), "one prompt a clip"
    prompted = [parse_prompt(prompt) for prompt in prompts]
    readings = read_shapes(videos)
    attributes = {
        name: (words == words.new_tensor([WORDS[name].index(getattr(a, name)) for a in prompted])).float()
        for name, words in readings.words.items()
    }
    adherence = torch.stack(list(attributes.values())).mean(0)
    return ShapeMeasures(attributes, adherence, readings.smoothness, readings.constancy)


@torch.no_grad()
def measure_displacement(videos: Tensor, prompts: Sequence[str]) -> Tensor:
    """The object's displacement along the prompt's direction over the mean one of the prompt's speed, `[B]`.

    1 is as asked, 0 stands still, below 0 goes back; 0 as well where no object is seen twice.

    Raises:
        UserError: a prompt is not a caption of the shapes data.
    """
    prompted = [parse_prompt(prompt) for prompt in prompts]
    parts = [segment(part.float(), border_pixels(part.float())) for part in videos.split(_CHUNK)]
    velocity = torch.cat([_velocity(scene) for scene in parts])
    velocity = velocity.masked_fill(~velocity.isfinite(), 0.0)
    direction = velocity.new_tensor([DIRECTIONS[each.direction] for each in prompted])
    usual = velocity.new_tensor([sum(SPEEDS[each.speed]) / 2 for each in prompted])
    return (velocity * direction).sum(-1) / usual


def read_words(videos: Tensor) -> list[dict[str, str | None]]:
    """The words that each of the clips `[B, T, 3, height, width]` shows; None where no word holds."""
    indices = {name: words.tolist() for name, words in read_shapes(videos).words.items()}
    return [
        {name: None if indices[name][b] == UNREADABLE else WORDS[name][indices[name][b]] for name in ATTRIBUTES}
        for b in range(len(videos))
    ]


@torch.no_grad()
def read_shapes(videos: Tensor) -> ShapeReadings:
    """Read clips `[B, T, 3, height, width]` in [0, 1], T at least 3, on their own device."""
    parts = [_read_chunk(videos[i : i + _CHUNK].float()) for i in range(0, len(videos), _CHUNK)]
    return ShapeReadings(
        words={name: torch.cat([part.words[name] for part in parts]) for name in ATTRIBUTES},
        frame_words={name: torch.cat([part.frame_words[name] for part in parts]) for name in parts[0].frame_words},
        smoothness=torch.cat([part.smoothness for part in parts]),
        constancy=torch.cat([part.constancy for part in parts]),
    )


@torch.no_grad()
def read_paths(videos: Tensor) -> tuple[Tensor, Tensor]:
    """The object's place in clips `[B, T, 3, height, width]`: relative x, y `[B, T, 2]`, and if it is seen `[B, T]`."""
    scenes = [segment(part.float(), border_pixels(part.float())) for part in videos.split(_CHUNK)]
    height, width = videos.shape[-2:]
    size = videos.new_tensor([width, height]) * (SHAPES_CLIP.width / min(height, width))
    return torch.cat([s.centroid for s in scenes]) / size, torch.cat([s.present for s in scenes])


def _read_chunk(videos: Tensor) -> ShapeReadings:
    border = border_pixels(videos)
    scene = segment(videos, border)
    best_fit, shape = scene.fits.max(-1)
    shape = shape.masked_fill(~scene.present | (best_fit < MIN_FIT), UNREADABLE)
    color = _nearest(scene.color, COLORS).masked_fill(~scene.present, UNREADABLE)
    direction, speed = _read_motion(scene)
    words = {
        "speed": speed,
        "color": _agreed(color, len(COLORS)),
        "shape": _agreed(shape, len(SHAPES)),
        "direction": direction,
        "background": _agreed(_nearest(border, BACKGROUNDS).flatten(1), len(BACKGROUNDS)),
    }
    return ShapeReadings(words, {"color": color, "shape": shape}, _smoothness(videos, scene), _constancy(scene))


def _read_motion(scene: Scene) -> tuple[Tensor, Tensor]:
    """Word indices (direction `[B]`, speed `[B]`) of the line through the centroids (Theil-Sen: median of slopes)."""
    centroid, present = scene.centroid, scene.present[..., None]
    frame, velocity = torch.arange(centroid.shape[1], device=centroid.device), _velocity(scene)
    path = centroid - velocity[:, None] * frame[:, None]
    off_path = (path - median(path, dim=1, valid=present)[:, None]).norm(dim=-1)  # [B, T]
    on_path = scene.present & (off_path < MAX_OFF_PATH)

    pace = velocity.norm(dim=-1)
    along, direction = (velocity @ velocity.new_tensor(list(DIRECTIONS.values())).T).max(-1)
    straight = on_path.float().mean(1) >= MIN_SHARE
    aimed = straight & (pace > MIN_MOTION) & (along > MIN_ALIGNMENT * pace)
    speed = torch.bucketize(pace, pace.new_tensor(SPEED_EDGES)) - 1  # -1 below the edges, 2 above them
    paced = straight & (speed >= 0) & (speed < len(WORDS["speed"]))
    return direction.masked_fill(~aimed, UNREADABLE), speed.masked_fill(~paced, UNREADABLE)


def _velocity(scene: Scene) -> Tensor:
    """Pixels a frame of the line through the centroids, `[B, 2]`; infinite where no object is seen twice."""
    centroid, present = scene.centroid, scene.present[..., None]
    frames = centroid.shape[1]
    early, late = torch.triu_indices(frames, frames, offset=1, device=centroid.device)
    slopes = (centroid[:, late] - centroid[:, early]) / (late - early)[:, None]
    return median(slopes, dim=1, valid=present[:, late] & present[:, early])


def _smoothness(videos: Tensor, scene: Scene) -> Tensor:
    """See `ShapeReadings`: `[B]`."""
    wobble = scene.centroid.diff(n=2, dim=1).norm(dim=-1)  # [B, T - 2]
    outside = scene.coverage == 0
    still = outside[:, 1:] & outside[:, :-1]
    change = videos.diff(dim=1).abs().mean(2) * still
    flicker = change.sum((-2, -1)) / still.sum((-2, -1)).clamp(min=1)  # [B, T - 1]
    flicker = (flicker[:, 1:] + flicker[:, :-1]) / 2
    seen = scene.present[:, 2:] & scene.present[:, 1:-1] & scene.present[:, :-2]
    return (seen * torch.exp(-wobble / WOBBLE_SCALE - flicker / FLICKER_SCALE)).mean(1)


def _constancy(scene: Scene) -> Tensor:
    """See `ShapeReadings`: `[B]`."""

    def departure(feature: Tensor) -> Tensor:
        """Distance `[B, T]` of each frame's feature `[B, T, D]` from its median over the clip."""
        usual = median(feature, dim=1, valid=scene.present[..., None])
        return (feature - usual[:, None]).square().sum(-1).sqrt()

    color, size, fit = departure(scene.color), departure(scene.area.log()[..., None]), departure(scene.fits)
    return (scene.present * torch.exp(-color / COLOR_SCALE - size / AREA_SCALE - fit / FIT_SCALE)).mean(1)


def _nearest(colors: Tensor, palette: dict[str, tuple[float, float, float]]) -> Tensor:
    """Index `[...]` of the palette colour within `COLOR_TOLERANCE` of colours `[..., 3]`, else UNREADABLE."""
    gaps = torch.cdist(colors, colors.new_tensor(list(palette.values())), compute_mode="donot_use_mm_for_euclid_dist")
    gap, index = gaps.min(-1)
    return index.masked_fill(gap > COLOR_TOLERANCE, UNREADABLE)


def _agreed(words: Tensor, num_words: int) -> Tensor:
    """The word `[B]` that at least `MIN_SHARE` of the readings `[B, N]` name, else UNREADABLE."""
    share, word = torch.stack([(words == w).float().mean(1) for w in range(num_words)], -1).max(-1)
    return word.masked_fill(share < MIN_SHARE, UNREADABLE)
