"""Classifier-free guidance (Ho & Salimans, 2022), written once."""

from __future__ import annotations

import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.types import VelocityFn


def guided(velocity: VelocityFn, negative: Condition, guidance_scale: float) -> VelocityFn:
    """`uncond + scale * (cond - uncond)`, both branches in one batched call (still two evaluations a clip).

    `negative` is one encoded prompt, `[1, L, D]`, shared by the whole batch; frames are given in both branches.
    """

    def guided_velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        negatives = negative.map(lambda part: part.expand(len(condition), *part.shape[1:])).with_given(condition.given)
        both = velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), Condition.cat([condition, negatives]))
        cond, uncond = both.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    return guided_velocity
