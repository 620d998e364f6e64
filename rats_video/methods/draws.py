"""Random numbers of a method, by each prompt's own seed: micro-batches, processes and resumed runs agree."""

from __future__ import annotations

import torch
from torch import Tensor

from rats_video.seeds import seeded
from rats_video.types import PromptBatch

# First number of each stream; those of `policy.py` count its rollouts from 0.
FAKE_SCORE, STUDENT_LEVEL, SCORE_LEVEL, DISCRIMINATOR, TRAJECTORY, REAL, RENOISE, GUIDANCE = range(10**6, 10**6 + 8)


def draw_noise(batch: PromptBatch, *stream: int) -> Tensor:
    """Standard normal, like the batch's noise `[B, C, F, H, W]`."""
    shape = batch.noise.shape[1:]
    return torch.stack([torch.randn(shape, generator=seeded(seed, *stream)) for seed in batch.seeds]).to(batch.noise)


def draw_uniform(batch: PromptBatch, *stream: int) -> Tensor:
    """Uniform in [0, 1), one a prompt, `[B]`, on the CPU."""
    return torch.cat([torch.rand(1, generator=seeded(seed, *stream)) for seed in batch.seeds])
