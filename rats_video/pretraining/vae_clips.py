"""The clips that a VAE learns from: rendered shapes, or a user's videos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rats_video.datasets.shapes.render import ShapeAttributes, render, split_combinations
from rats_video.datasets.video.pool import read_videos
from rats_video.seeds import seeded
from rats_video.types import ClipSpec

DrawFn = Callable[[int, int, tuple[int, ...]], Tensor]
"""`(clips, frames, seeds) -> [B, T, 3, height, width]` in [0, 1], a pure function of its arguments."""


@dataclass(frozen=True)
class VaeData:
    """Clips to train a VAE on, and held-out ones to score it on."""

    train: DrawFn
    heldout: DrawFn


def draw_shapes(
    combinations: list[ShapeAttributes],
    batch: int,
    clip: ClipSpec,
    seeds: tuple[int, ...],
    device: torch.device,
    spread: float = 1.0,
) -> tuple[Tensor, list[ShapeAttributes]]:
    """A batch of rendered clips of random combinations, a pure function of `seeds`."""
    generator = seeded(*seeds)
    chosen = torch.randint(len(combinations), (batch,), generator=generator).tolist()
    attributes = [combinations[i] for i in chosen]
    return render(attributes, clip, generator, device, spread=spread), attributes


def shapes_clips(clip: ClipSpec, device: torch.device) -> VaeData:
    """Rendered shapes: the training combinations, and the held-out ones."""

    def draws(combinations: list[ShapeAttributes]) -> DrawFn:
        return lambda batch, frames, seeds: draw_shapes(
            combinations, batch, replace(clip, num_frames=frames), seeds, device
        )[0]

    return VaeData(*map(draws, split_combinations()))


def video_clips(source: str, clip: ClipSpec, device: torch.device) -> VaeData:
    """Clips of a user's videos; raises UserError where there are too few."""
    train, heldout = read_videos(source, clip)
    return VaeData(
        lambda batch, frames, seeds: train.draw(batch, frames, seeds, device),
        lambda batch, frames, seeds: heldout.draw(batch, frames, seeds, device),
    )
