"""Classifier-free guidance (Ho & Salimans, 2022), written once."""

from __future__ import annotations

import torch
from torch import Tensor

from rats_video.types import TextCondition, VelocityFn


def guided(velocity: VelocityFn, negative: TextCondition, guidance_scale: float) -> VelocityFn:
    """`uncond + scale * (cond - uncond)`, both branches in one batched call (still two evaluations a clip).

    `negative` is one encoded prompt, `[1, L, D]`, shared by the whole batch.
    """

    def guided_velocity(latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        negatives = negative.map(lambda part: part.expand(len(text), *part.shape[1:]))
        both = velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), TextCondition.cat([text, negatives]))
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return guided_velocity
