"""The global batch of a step: its prompts, noise and step count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rats_video.seeds import seeded
from rats_video.training.settings import RunSettings
from rats_video.types import Backbone, PromptBatch


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
    )


def slice_batch(batch: PromptBatch, rows: slice) -> PromptBatch:
    """Some rows of a batch, with their own prompts, noise and seeds."""
    return replace(batch, prompts=batch.prompts[rows], noise=batch.noise[rows], seeds=batch.seeds[rows])


def _grad_frames(window: int | None, frames: int, generator: torch.Generator) -> range | None:
    """The latent frames decoded with gradient: a window at a random place, or all."""
    if window is None or window >= frames:
        return None
    first = int(torch.randint(frames - window + 1, (1,), generator=generator))
    return range(first, first + window)
