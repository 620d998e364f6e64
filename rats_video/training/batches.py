"""The global batch of a step: its prompts, noise and step count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rats_video.condition import GivenFrames
from rats_video.seeds import seeded
from rats_video.training.settings import RunSettings
from rats_video.types import Backbone, ClipSpec, PromptBatch


def draw_batch(backbone: Backbone, cfg: RunSettings, prompts: Sequence[str], step: int) -> PromptBatch:
    """The global batch of a step, a pure function of seed and step.

    Resumed runs, all arms of a comparison and any number of processes agree on it.
    """
    index = step // cfg.teacher.reuse
    generator = seeded(cfg.seed, 1, index)
    chosen = torch.randint(len(prompts), (cfg.training.batch_size,), generator=generator).tolist()
    noise = backbone.sample_noise(len(chosen), cfg.clip.spec, generator)
    return PromptBatch(
        index=index,
        prompts=tuple(prompts[i] for i in chosen),
        noise=noise,
        num_steps=cfg.student.num_steps[index % len(cfg.student.num_steps)],
        grad_frames=_grad_frames(cfg.compute.decode.window, noise.shape[2], seeded(cfg.seed, 3, step)),
        seeds=tuple(torch.randint(2**62, (len(chosen),), generator=seeded(cfg.seed, 4, step)).tolist()),
        asked=_asked(cfg, index, len(chosen)),
        asked_share=cfg.teacher.asked,
        picture_seeds=tuple(torch.randint(2**62, (len(chosen),), generator=seeded(cfg.seed, 7, index)).tolist()),
    )


def with_pictures(batch: PromptBatch, backbone: Backbone, clip: ClipSpec) -> PromptBatch:
    """The batch with the frames that its clips start from, where the run has pictures."""
    if backbone.first_frames is None:
        return batch
    first, last = backbone.first_frames(batch.prompts, batch.picture_seeds)
    return replace(batch, given=encode_pictures(backbone, clip, first, last))


def encode_pictures(backbone: Backbone, clip: ClipSpec, first: Tensor, last: Tensor | None = None) -> GivenFrames:
    """What the model is told of pictures, one clip at a time: some families encode a whole clip for each."""
    ends = [None] * len(first) if last is None else last.split(1)
    return GivenFrames.cat([
        backbone.given_frames(clip, begin, end) for begin, end in zip(first.split(1), ends, strict=True)
    ])  # fmt: skip


def slice_batch(batch: PromptBatch, rows: slice) -> PromptBatch:
    """Some rows of a batch, with what belongs to each of them."""
    return batch.take(range(len(batch.prompts))[rows])


def _asked(cfg: RunSettings, index: int, clips: int) -> tuple[bool, ...] | None:
    """The clips whose teacher is asked: systematic sampling, every 1/share-th of the run's clips (or updates).

    The first one is drawn, so that each clip's probability is `teacher.asked`; then as many are asked in any stretch of
    the run, to one.
    """
    share = cfg.teacher.asked
    if share == 1:
        return None
    start = _uniform(cfg.seed, 6)
    if cfg.teacher.asked_by == "update":
        return (_passes_a_whole(index, share, start),) * clips
    return tuple(_passes_a_whole(index * clips + row, share, start) for row in range(clips))


def ask_with(batch: PromptBatch, cfg: RunSettings, share: float) -> PromptBatch:
    """The batch with another share of clips whose teacher is asked, drawn anew for it alone.

    Given the share, each clip is asked with just that probability, whatever was asked before: the share may depend on
    all that.
    """
    clips, start = len(batch.prompts), _uniform(cfg.seed, 8, batch.index)
    if cfg.teacher.asked_by == "update":
        asked = (_passes_a_whole(0, share, start),) * clips
    else:
        asked = tuple(_passes_a_whole(row, share, start) for row in range(clips))
    return replace(batch, asked=asked, asked_share=share)


def _uniform(*seeds: int) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=seeded(*seeds)))


def _passes_a_whole(place: int, share: float, start: float) -> bool:
    return math.floor((place + 1) * share + start) > math.floor(place * share + start)


def _grad_frames(window: int | None, frames: int, generator: torch.Generator) -> range | None:
    """The latent frames decoded with gradient: a window at a random place, or all."""
    if window is None or window >= frames:
        return None
    first = int(torch.randint(frames - window + 1, (1,), generator=generator))
    return range(first, first + window)
