"""Short clips of a user's videos, in memory as bytes, for what learns from pixels before there are any latents."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from rats_video.datasets.video.clips import read_source
from rats_video.datasets.video.settings import BucketConfig, PrepareConfig
from rats_video.datasets.video.sources import find_sources
from rats_video.errors import UserError, warn
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

HELD_OUT = 8  # one clip in so many
MOST_BYTES = 2**33


@dataclass(frozen=True)
class VideoPool:
    """Clips `[N, T, 3, height, width]`, uint8."""

    clips: Tensor

    def draw(self, batch: int, frames: int, seeds: tuple[int, ...], device: torch.device) -> Tensor:
        """`[B, frames, 3, height, width]` in [0, 1]: anywhere in random clips, half of them mirrored."""
        generator = seeded(*seeds)
        chosen = torch.randint(len(self.clips), (batch,), generator=generator).tolist()
        starts = torch.randint(self.clips.shape[1] - frames + 1, (batch,), generator=generator).tolist()
        mirrored = (torch.rand(batch, generator=generator) < 0.5).tolist()
        taken = [self.clips[clip, start : start + frames] for clip, start in zip(chosen, starts, strict=True)]
        turned = [clip.flip(-1) if mirror else clip for clip, mirror in zip(taken, mirrored, strict=True)]
        return torch.stack(turned).to(device).float() / 255


def read_videos(source: str, clip: ClipSpec) -> tuple[VideoPool, VideoPool]:
    """All clips of this size that SOURCE gives, as `prepare` cuts them, captions or not: to learn, and held out.

    Raises:
        UserError: it gives fewer than two, or more than fit into memory.
    """
    bucket = BucketConfig(num_frames=clip.num_frames, height=clip.height, width=clip.width)
    cfg = PrepareConfig(model="", fps=clip.fps, buckets=(bucket,), missing_caption="empty")
    found = find_sources(source, cfg)
    videos = [each for each in found.videos if each.kind != "image" or clip.num_frames == 1]
    if images := len(found.videos) - len(videos):
        warn(f"{images} images are left out: clips have {clip.num_frames} frames", where=source)
    read = [read_source(video, cfg) for video in videos]
    for reason, count in Counter(each.reason for one in read for each in one.skipped).most_common():
        warn(f"{count} times: {reason}", where=source)
    clips = [each.frames for one in read for each in one.clips]
    if len(clips) < 2:
        raise UserError(f"gives {len(clips)} clips of {clip.num_frames} frames", where=source, fix="give more videos")
    pixels = torch.stack(clips)
    if pixels.numel() > MOST_BYTES:
        raise UserError(f"gives {len(clips)} clips, over {MOST_BYTES} bytes", where=source, fix="give fewer videos")
    is_heldout = torch.arange(len(clips)) % HELD_OUT == min(HELD_OUT, len(clips)) - 1
    return VideoPool(pixels[~is_heldout]), VideoPool(pixels[is_heldout])
