"""Clips that a reward could not score: the loss skips them, and nothing of them reaches the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rats_video.errors import warn
from rats_video.types import RewardScores

SKIPPED = "reward/skipped"
"""The log's name for skipped clips: their share in a step's own row, their number in a run's."""

ASKED = "teacher/asked"
"""The log's name for the share of clips whose teacher was asked and whose scores are finite, where not all are."""


def finite_clips(*scored: RewardScores) -> Tensor:
    """`[B]` bool: clips whose scores are all finite: of the clip, of its frames and by part."""
    rows = [row[:, None] for scores in scored for row in (scores.clip, *scores.parts.values())]
    rows += [scores.frames for scores in scored if scores.frames is not None]
    return torch.cat([row.detach() for row in rows], dim=1).isfinite().all(dim=1)


def mask_scores(scores: RewardScores, kept: Tensor, other: float = 0.0) -> RewardScores:
    """The scores of clips that are kept `[B]`; the others get one that passes no gradient on."""
    frames = None if scores.frames is None else torch.where(kept[:, None], scores.frames, other)
    parts, judged = (
        {name: torch.where(kept, part, other) for name, part in each.items()} for each in (scores.parts, scores.judged)
    )
    return RewardScores(torch.where(kept, scores.clip, other), frames, parts, judged)


def block_gradient(latents: Tensor, kept: Tensor) -> None:
    """Zeroes the gradient into `latents` `[B, C, F, H, W]` for clips where `kept` `[B]` is False.

    A score without gradient still sends 0 into the reward, and where the reward's slope is infinite 0 turns into NaN.
    """
    if latents.requires_grad:
        latents.register_hook(lambda gradient: torch.where(kept.view(-1, 1, 1, 1, 1), gradient, 0.0))


def warn_skipped(prompts: Sequence[str], kept: Tensor) -> None:
    """Name the skipped clips; a run skips `training.max_skipped` at most."""
    for prompt, is_kept in zip(prompts, kept.tolist(), strict=True):
        if not is_kept:
            warn(f"clip left out, its score is not a finite number: {prompt!r}", where="reward")
