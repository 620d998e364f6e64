"""Classifier-free guidance (Ho & Salimans, 2022), written once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rats_video.types import TextCondition, VelocityFn


def guided(velocity: VelocityFn, negative: TextCondition, guidance_scale: float) -> VelocityFn:
    """`uncond + scale * (cond - uncond)`, both branches in one batched call (still two evaluations a clip).

    `negative` is one encoded prompt, `[1, L, D]`, shared by the whole batch.
    """

    def guided_velocity(latents: Tensor, sigma: Tensor, text: TextCondition) -> Tensor:
        both = velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), _concatenate(text, negative))
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return guided_velocity


def _concatenate(text: TextCondition, negative: TextCondition) -> TextCondition:
    """Prompts, then as many copies of the negative one; the shorter is padded with zero rows."""
    length = max(text.embeds.shape[1], negative.embeds.shape[1])
    negatives = negative.embeds.expand(len(text), -1, -1)
    rows = [F.pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds in (text.embeds, negatives)]
    return TextCondition(torch.cat(rows))
