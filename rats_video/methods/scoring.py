"""Scores of a sampler's latents and clips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rats_video.errors import UserError
from rats_video.methods.finite import mask_scores
from rats_video.sound import Sound, hears, sees
from rats_video.timing import phase
from rats_video.types import Backbone, LatentScorer, Reward, RewardScores


@phase("reward")
def score_clips(
    reward: Reward, backbone: Backbone, latents: Tensor, prompts: Sequence[str], grad_frames: range | None = None
) -> RewardScores:
    """Scores of clean latents `[B, C, F, H, W]`: of what they decode to, or directly by a reward that needs none."""
    if isinstance(reward, LatentScorer):
        return reward.score_latents(latents, prompts)
    sound = backbone.decode_sound(latents) if hears(reward) else None
    # Of a reward that only hears, the pixels would cost a decode: it is given none.
    videos = backbone.decode(latents, grad_frames) if sees(reward) else latents.new_zeros(len(latents), 1, 3, 1, 1)
    return score_pixels(reward, videos, prompts, sound)


def score_pixels(reward: Reward, videos: Tensor, prompts: Sequence[str], sound: Sound | None = None) -> RewardScores:
    """Scores of clips `[B, T, 3, height, width]`, NaN for a clip with pixels or sound that are not finite.

    No reward sees such pixels: what a network makes of them, and of their gradient, is not its authors' concern.

    Raises:
        UserError: the reward hears, and the clips have no sound.
    """
    finite = videos.isfinite()
    kept = finite.flatten(1).all(dim=1)
    if hears(reward):
        if sound is None:
            fix = "choose rewards that look at pixels, or a model whose clips have sound, such as LTX-2"
            raise UserError("hears clips, and these have no sound", where="reward", fix=fix)
        heard = sound.waves.isfinite()
        kept = kept & heard.flatten(1).all(dim=1)
    if bool(kept.all()):
        return call_reward(reward, videos, prompts, sound)
    if hears(reward) and sound is not None:
        sound = Sound(torch.where(heard, sound.waves, 0.0), sound.rate)
    return mask_scores(call_reward(reward, torch.where(finite, videos, 0.0), prompts, sound), kept, math.nan)


def call_reward(reward: Reward, videos: Tensor, prompts: Sequence[str], sound: Sound | None) -> RewardScores:
    """The scores of a reward, which is given the sound if it hears."""
    return reward(videos, prompts, sound) if hears(reward) else reward(videos, prompts)  # type: ignore[call-arg]
