"""Chooses the frames of a video that become clips: pure planning, without a picture.

A clip's k-th frame is the one displayed nearest to k / fps seconds after its first. Where the source shows fewer frames
a second than the clip, frames come twice: nothing is invented between them, and `Span.repeated` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rats_video.datasets.video.settings import BucketConfig, CutConfig, PrepareConfig

Times = NDArray[np.float64]
Size = tuple[int, int]

SAME_ASPECT = 0.05  # of log(width / height): sides are multiples of 16 or 32, which makes 832 x 480 of 16:9
_MICROSECOND = 1e-6  # times are rounded


@dataclass(frozen=True)
class Span:
    """Frames of a source that make a clip.

    Args:
        indices: `bucket.num_frames` of them, never falling.
        bucket: the clip's size.
        start: seconds where the first frame begins.
        end: seconds where the last one is over.
        scene: which scene, from 0.
    """

    indices: tuple[int, ...]
    bucket: BucketConfig
    start: float
    end: float
    scene: int

    @property
    def repeated(self) -> int:
        """Frames that are their predecessor once more."""
        return len(self.indices) - len(set(self.indices))


def plan_spans(
    times: Times, scenes: Sequence[range], buckets: Sequence[BucketConfig], cfg: PrepareConfig
) -> tuple[list[Span], list[str]]:
    """Spans that become clips, in order; none crosses a cut, none shares a frame with another.

    Args:
        times: seconds `[N]` at which each frame of the video begins, rising.
        scenes: frames between cuts, in order, without gaps; together they are what of the video may be used.
        buckets: `suitable_buckets`; each span gets the first that it fills.
        cfg: `fps`, and of `cut`: `spans`, `max_clips`, `margin_seconds`.

    Returns:
        The spans, and for each scene that fills no bucket a clause that says what it lacks.
    """
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1 / cfg.fps
    most = math.inf if cfg.cut.max_clips is None else cfg.cut.max_clips
    spans: list[Span] = []
    short: list[str] = []
    for number, scene in enumerate(_without_margins(times, scenes, cfg.cut)):
        if len(spans) >= most:
            break
        grid = _Grid(times[: scene.stop], gap, cfg.fps)
        found = list(_in_scene(grid, scene.start, number, buckets, cfg.cut))
        spans += found
        short += [] if found else [grid.shortfall(scene.start, buckets)]
    return spans[: None if math.isinf(most) else int(most)], short


def suitable_buckets(size: Size, cfg: PrepareConfig) -> list[BucketConfig]:
    """Buckets for a video of that height and width, the best first.

    Those whose aspect is nearest, within 5% of each other; of them the longest; of these the largest that needs no
    upscaling, and only then those that do, the smallest first (never, without `cut.allow_upscale`).
    """
    near = nearest_buckets(size, cfg)
    return [bucket for bucket in near if cfg.cut.allow_upscale or _scale(bucket, size, cfg) <= 1]


def nearest_buckets(size: Size, cfg: PrepareConfig) -> list[BucketConfig]:
    """Buckets of the nearest aspect, in the order of `suitable_buckets`, those among them that need upscaling."""
    height, width = size

    def apart(bucket: BucketConfig) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    def rank(bucket: BucketConfig) -> tuple[int, bool, int]:
        area, too_large = bucket.height * bucket.width, _scale(bucket, size, cfg) > 1
        return -bucket.num_frames, too_large, area if too_large else -area

    nearest = min(map(apart, cfg.buckets))
    return sorted((bucket for bucket in cfg.buckets if apart(bucket) <= nearest + SAME_ASPECT), key=rank)


def _scale(bucket: BucketConfig, size: Size, cfg: PrepareConfig) -> float:
    """The bucket's pixels a pixel of a video of that height and width, by the side that decides."""
    scales = bucket.height / size[0], bucket.width / size[1]
    return min(scales) if cfg.fit == "pad" else max(scales)


def _without_margins(times: Times, scenes: Sequence[range], cut: CutConfig) -> Iterator[range]:
    """The scenes less the time beside cuts; the ends of the video are none."""
    for scene in scenes:
        first, stop = scene.start, scene.stop
        if scene is not scenes[0]:
            first = int(np.searchsorted(times, times[first] + cut.margin_seconds - _MICROSECOND))
        if scene is not scenes[-1]:
            stop = int(np.searchsorted(times, times[stop] - cut.margin_seconds - _MICROSECOND))
        yield range(first, max(first, stop))


@dataclass(frozen=True)
class _Grid:
    """Frames of a scene, and those before it, by their times.

    Args:
        times: of frames up to the scene's last.
        gap: usual seconds between frames.
        fps: frames a second of clips.
    """

    times: Times
    gap: float
    fps: float

    def duration(self, bucket: BucketConfig) -> float:
        """Seconds from the first frame to the last."""
        return (bucket.num_frames - 1) / self.fps

    def shortfall(self, first: int, buckets: Sequence[BucketConfig]) -> str:
        """A clause for frames from `first` on that fill no bucket: how many they would give, and how many would do."""
        if first >= len(self.times):
            return "nothing is left between the margins of its cuts"
        start, end = self.times[first], self.times[-1]
        tolerance = self.gap / 2 if first + 1 < len(self.times) else 0.0
        wanted = min(bucket.num_frames for bucket in buckets)
        count = min(wanted - 1, 1 + int((end - start + tolerance + _MICROSECOND) * self.fps))  # rounding apart
        span = f"{start:.2f} to {end + self.gap:.2f} s"
        frames = f"{count} frame{'s' * (count > 1)} at {self.fps:g} a second"
        return f"{span} gives {frames}; the shortest bucket takes {wanted}"

    def slack(self, first: int, bucket: BucketConfig) -> float:
        """Seconds to spare where a clip begins with frame `first`; negative where it does not fit."""
        if first >= len(self.times):
            return -math.inf
        tolerance = self.gap / 2 if bucket.num_frames > 1 and first + 1 < len(self.times) else 0.0
        return float(self.times[-1] - self.times[first]) + tolerance + _MICROSECOND - self.duration(bucket)

    def span(self, first: int, bucket: BucketConfig, scene: int) -> Span:
        """The clip that begins with frame `first`, where there is slack."""
        times = self.times[first:]
        wanted = times[0] + np.arange(bucket.num_frames) / self.fps
        later = np.searchsorted(times, wanted).clip(max=len(times) - 1)
        sooner = (later - 1).clip(min=0)
        nearest = np.where(wanted - times[sooner] <= times[later] - wanted + _MICROSECOND, sooner, later)
        over = int(nearest[-1]) + 1
        end = times[over] if over < len(times) else times[-1] + self.gap
        return Span(tuple((first + nearest).tolist()), bucket, float(times[0]), float(end), scene)


def _in_scene(grid: _Grid, first: int, scene: int, buckets: Sequence[BucketConfig], cut: CutConfig) -> Iterator[Span]:
    while bucket := next((bucket for bucket in buckets if grid.slack(first, bucket) >= 0), None):
        if cut.spans == "middle":  # the last frame that leaves at least half of the slack behind it
            middle = grid.times[first] + grid.slack(first, bucket) / 2
            first = int(np.searchsorted(grid.times, middle, side="right")) - 1
        span = grid.span(first, bucket, scene)
        yield span
        if cut.spans != "all":
            return
        follows = np.searchsorted(grid.times, span.start + bucket.num_frames / grid.fps - grid.gap / 2)
        first = max(span.indices[-1] + 1, int(follows))
