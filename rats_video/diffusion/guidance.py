"""Classifier-free guidance (Ho & Salimans, 2022), written once; the formula that joins its branches is the family's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rats_video.condition import Condition
from rats_video.types import Backbone, Guide, VelocityFn

GuidanceScale = float | Callable[[Tensor], Tensor]
"""One scale, or `noise levels [B] -> scales [B]`."""


def scale_of(backbone: Backbone, guidance_scale: float, guidance_scale_2: float | None) -> GuidanceScale:
    """The scale of each noise level: `guidance_scale_2`, if given, is that of the second expert of two.

    As in the stock pipelines a `guidance_scale` of 1 switches guidance off for both.

    Raises:
        UserError: the model has no second expert.
    """
    if guidance_scale_2 is None:
        return guidance_scale
    by_level = backbone.guidance_by_level(guidance_scale, guidance_scale_2)
    return 1.0 if guidance_scale == 1.0 else by_level


def plain_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """`uncond + scale * (cond - uncond)`."""
    return uncond + scale * (cond - uncond)


PLAIN = Guide.of(plain_guidance)


def norm_preserving(cond: Tensor, uncond: Tensor, scale: float | Tensor, dim: int) -> Tensor:
    """The plain formula's direction at the length of `cond`, taken along `dim` (`QwenImagePipeline`)."""
    plain = plain_guidance(cond, uncond, scale)
    lengths: Tensor = cond.norm(dim=dim, keepdim=True) / plain.norm(dim=dim, keepdim=True)
    return plain * lengths


def with_spread(clips: Tensor, like: Tensor, share: float) -> Tensor:
    """Clips with a `share` of the standard deviation of `like`, each clip's over all its numbers (arXiv 2305.08891)."""
    dims = tuple(range(1, clips.ndim))
    return clips * (share * like.std(dims, keepdim=True) / clips.std(dims, keepdim=True) + 1 - share)


def guided(
    velocity: VelocityFn, negative: Condition, guidance_scale: GuidanceScale, guide: Guide = PLAIN
) -> VelocityFn:
    """Both branches in one batched call (still two evaluations a clip), put together by `guide`, which may make more.

    `negative` is one encoded prompt, `[1, L, D]`, shared by the whole batch; frames are given in both branches.
    """

    def guided_velocity(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        negatives = negative.map(lambda part: part.expand(len(condition), *part.shape[1:])).with_given(condition.given)
        both = velocity(torch.cat([latents, latents]), torch.cat([sigma, sigma]), Condition.cat([condition, negatives]))
        cond, uncond = both.chunk(2)
        scale = guidance_scale(sigma).view(-1, 1, 1, 1, 1) if callable(guidance_scale) else guidance_scale
        return guide.join(cond, uncond, scale, latents, sigma, condition)

    return guided_velocity
