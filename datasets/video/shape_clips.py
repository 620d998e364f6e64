"""The synthetic shapes as sources of `prepare`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from rats_video.datasets.shapes.render import SHAPES_CLIP, ShapeAttributes, render, split_combinations
from rats_video.datasets.video.records import CutClip, ReadSource, SourceVideo, split_of
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig
from rats_video.errors import UserError
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

_WORDS, _PATH = 0, 1  # streams of random numbers of a clip
_SPLITS = dict(zip(("train", "heldout"), split_combinations(), strict=True))


@dataclass(frozen=True)
class _Shape:
    """The contents of clip `index`: a pure function of the configuration's seed and buckets, and the index."""

    index: int
    cfg: PrepareConfig

    @property
    def bucket(self) -> BucketConfig:
        return self.cfg.buckets[self.index % len(self.cfg.buckets)]

    @property
    def digest(self) -> str:
        """Stands for the bytes of a file."""
        return hashlib.sha256(f"shape {self.cfg.seed} {self.index} {self.bucket!r}".encode()).hexdigest()

    @property
    def attributes(self) -> ShapeAttributes:
        """Clips that are held out show combinations of words that the others do not."""
        choices = _SPLITS[split_of(self.digest, self.cfg)]
        return choices[int(torch.randint(len(choices), (), generator=self.generator(_WORDS)))]

    def generator(self, stream: int) -> torch.Generator:
        return seeded(self.cfg.seed, stream, self.index)


def list_shapes(cfg: PrepareConfig) -> list[SourceVideo]:
    """`cfg.num_shapes` clips to be rendered, the same for the same seed and buckets however many there are.

    Raises:
        UserError: a bucket is so long that the shape would leave the picture.
    """
    for number, bucket in enumerate(cfg.buckets):
        if bucket.num_frames > SHAPES_CLIP.num_frames:
            most = f"shapes cross the picture in {SHAPES_CLIP.num_frames} frames"
            raise UserError(f"{bucket.num_frames} are too many: {most}", where=f"buckets.{number}.num_frames")
    return [
        SourceVideo(
            f"shapes/{index:06d}", Path("shapes"), _Shape(index, cfg).attributes.prompt, kind="shape", index=index
        )
        for index in range(cfg.num_shapes)
    ]


def render_shape(source: SourceVideo, cfg: PrepareConfig) -> ReadSource:
    """The one clip of a source of `list_shapes`, at `cfg.fps`."""
    shape = _Shape(source.index, cfg)
    bucket = shape.bucket
    spec = ClipSpec(bucket.num_frames, bucket.height, bucket.width, cfg.fps)
    video = render([shape.attributes], spec, shape.generator(_PATH))[0]
    frames = (video * 255).round().to(torch.uint8)
    return ReadSource(source, shape.digest, (CutClip(frames, bucket, 0.0, bucket.num_frames / cfg.fps),))
