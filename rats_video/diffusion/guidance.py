"""Classifier-free guidance (Ho & Salimans, 2022), written once; the formula that joins its branches is the family's."""

from __future__ import annotations

import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.types import GuideFn, VelocityFn


def plain_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """`uncond + scale * (cond - uncond)`."""
    return uncond + scale * (cond - uncond)


def norm_preserving(cond: Tensor, uncond: Tensor, scale: float, dim: int) -> Tensor:
    """The plain formula's direction at the length of `cond`, taken along `dim` (`QwenImagePipeline`)."""
    plain = plain_guidance(cond, uncond, scale)
    lengths: Tensor = cond.norm(dim=dim, keepdim=True) / plain.norm(dim=dim, keepdim=True)
    return plain * lengths


def guided(
    velocity: VelocityFn, negative: Condition, guidance_scale: float, guide: GuideFn = plain_guidance
) -> VelocityFn:
    """Both branches in one batched call (still two evaluations a clip), put together by `guide`.

    `negative` is one encoded prompt, `[1, L, D]`, shared by the whole batch; frames are given in both branches.
    """

    def guided_velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        negatives = negative.map(lambda part: part.expand(len(condition), *part.shape[1:])).with_given(condition.given)
        both = velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), Condition.cat([condition, negatives]))
        cond, uncond = both.chunk(2)
        return guide(cond, uncond, guidance_scale)

    return guided_velocity
