"""Clips that a reward could not score: they are left out of the loss, and nothing of them reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rats_video.errors import warn
from rats_video.types import RewardScores

SKIPPED = "reward/skipped"
"""The log's name for clips left out: their share in a step's own row, their number in a run's."""


def finite_clips(*judged: RewardScores) -> Tensor:
    """`[B]` bool: clips whose scores, of the clip, its frames and its parts, are finite in all of these."""
    rows = [row[:, None] for scores in judged for row in (scores.clip, *scores.parts.values())]
    rows += [scores.frames for scores in judged if scores.frames is not None]
    return torch.cat([row.detach() for row in rows], dim=1).isfinite().all(dim=1)


def mask_scores(scores: RewardScores, kept: Tensor) -> RewardScores:
    """The scores of clips that are kept `[B]`; of the others 0, which passes no gradient on."""
    frames = None if scores.frames is None else torch.where(kept[:, None], scores.frames, 0.0)
    parts = {name: torch.where(kept, part, 0.0) for name, part in scores.parts.items()}
    return RewardScores(torch.where(kept, scores.clip, 0.0), frames, parts)


def block_gradient(latents: Tensor, kept: Tensor) -> None:
    """Let no gradient of clips that are not kept `[B]` reach `latents` `[B, C, F, H, W]`.

    A score without gradient still sends 0 into the reward, and where the reward's slope is infinite 0 turns into NaN.
    """
    if latents.requires_grad:
        latents.register_hook(lambda gradient: torch.where(kept.view(-1, 1, 1, 1, 1), gradient, 0.0))


def warn_skipped(prompts: Sequence[str], kept: Tensor) -> None:
    """Say which clips are left out; a run leaves out `training.max_skipped` at most."""
    for prompt, is_kept in zip(prompts, kept.tolist(), strict=True):
        if not is_kept:
            warn(f"clip left out, its score is not a finite number: {prompt!r}", where="reward")
