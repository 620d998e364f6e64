"""Corruptions of clips, for preference pairs: each returns the corrupted clips, and the frames that show it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

Corruption = Callable[[Tensor, Tensor, Generator], tuple[Tensor, Tensor]]
"""`(clips [B, T, 3, H, W], other clips of the same shape, generator) -> (damaged clips, damaged frames [B, T])`."""


def _uniform(generator: Generator, batch: int, low: float, high: float) -> Tensor:
    return (low + (high - low) * torch.rand(batch, generator=generator)).view(-1, 1, 1, 1, 1)


def _span(generator: Generator, clips: Tensor) -> Tensor:
    """Corrupted frames `[B, T]`: the whole clip in half of the cases, a random span of it in the others."""
    batch, frames = clips.shape[:2]
    start = torch.randint(frames, (batch, 1), generator=generator)
    length = torch.randint(2, frames, (batch, 1), generator=generator)
    whole = torch.rand(batch, 1, generator=generator) < 0.5
    index = torch.arange(frames)[None]
    return (((index >= start) & (index < start + length)) | whole).to(clips.device)


def _blend(clips: Tensor, damaged: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(frames[:, :, None, None, None], damaged, clips).clamp(0, 1), frames


def noise(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Grain, some of it coarse."""
    batch, frames, _channels, height, width = clips.shape
    cell = int(torch.randint(1, 5, (1,), generator=generator))
    grain = torch.randn(batch * frames, 3, -(-height // cell), -(-width // cell), generator=generator)
    grain = F.interpolate(grain, size=(height, width), mode="nearest").view_as(clips)
    strength = _uniform(generator, batch, 0.04, 0.25)
    return _blend(clips, clips + (strength * grain).to(clips.device), _span(generator, clips))


def blur(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Loss of detail by a factor of 3 to 8."""
    height, width = clips.shape[-2:]
    factor = int(torch.randint(3, 9, (1,), generator=generator))
    small = F.interpolate(clips.flatten(0, 1), size=(height // factor, width // factor), mode="area")
    smooth = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False).view_as(clips)
    return _blend(clips, smooth, _span(generator, clips))


def flicker(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Brightness that changes from frame to frame."""
    batch, frames = clips.shape[:2]
    strength = _uniform(generator, batch, 0.06, 0.25)
    gain = (strength * torch.randn(batch, frames, 1, 1, 1, generator=generator)).to(clips.device)
    return _blend(clips, clips + gain, _span(generator, clips))


def ghosting(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """A faint copy of a frame some steps away."""
    shift = int(torch.randint(3, 9, (1,), generator=generator))
    strength = _uniform(generator, len(clips), 0.2, 0.5).to(clips.device)
    return _blend(clips, clips.lerp(clips.roll(shift, dims=1), strength), _span(generator, clips))


def shuffle(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Frames in random order."""
    order = torch.rand(clips.shape[:2], generator=generator).argsort(dim=1).to(clips.device)
    rows = torch.arange(len(clips), device=clips.device)[:, None]
    return clips[rows, order], order != torch.arange(clips.shape[1], device=clips.device)


def jitter(clips: Tensor, _: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Frames displaced by one to three pixels along both axes."""
    batch, frames = clips.shape[:2]
    offsets = torch.randint(1, 4, (batch, frames, 2), generator=generator)
    offsets = offsets * (2 * torch.randint(2, (batch, frames, 2), generator=generator) - 1)
    moves = offsets.any(dim=2).to(clips.device)
    damaged = torch.stack([
        torch.stack([frame.roll((int(dy), int(dx)), dims=(1, 2)) for frame, (dy, dx) in zip(clip, shifts, strict=True)])
        for clip, shifts in zip(clips, offsets, strict=True)
    ])  # fmt: skip
    return _blend(clips, damaged, _span(generator, clips) & moves)


def swap(clips: Tensor, others: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """From some frame on, another clip."""
    batch, frames = clips.shape[:2]
    start = torch.randint(2, frames - 1, (batch, 1), generator=generator)
    return _blend(clips, others, (torch.arange(frames)[None] >= start).to(clips.device))


CORRUPTIONS: tuple[Corruption, ...] = (noise, blur, flicker, ghosting, shuffle, jitter, swap)


def corrupt(clips: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Corrupt each clip in one random way.

    Args:
        clips: `[B, T, 3, height, width]` in [0, 1].
        generator: a CPU generator.

    Returns:
        Corrupted clips, and the frames that show it, `[B, T]` bool.
    """
    chosen = torch.randint(len(CORRUPTIONS), (len(clips),), generator=generator)
    damaged, frames = clips.clone(), torch.zeros(clips.shape[:2], dtype=torch.bool, device=clips.device)
    others = clips.roll(1, dims=0)
    for index, corruption in enumerate(CORRUPTIONS):
        rows = (chosen == index).nonzero()[:, 0].to(clips.device)
        if len(rows):
            damaged[rows], frames[rows] = corruption(clips[rows], others[rows], generator)
    return damaged, frames
