"""Losses of a word reward: for the words that clips show, and for the better one of two clips."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F


def word_loss(clip: Tensor, frames: Tensor, words: Tensor, frame_words: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of each word's presence in the clip, and half as much by frame; labels are smoothed.

    Args:
        clip: log-odds `[B, V + 1]`, the last of them quality's.
        frames: `[B, T, V + 1]`.
        words: 0 or 1, `[B, V]`.
        frame_words: `[B, T, V]`.
        smoothing: how far labels stay from 0 and 1.
    """
    low, high = smoothing, 1 - smoothing
    by_clip = F.binary_cross_entropy_with_logits(clip[:, :-1], words.clamp(low, high))
    by_frame = F.binary_cross_entropy_with_logits(frames[..., :-1], frame_words.clamp(low, high))
    return by_clip + 0.5 * by_frame


def preference_loss(good: Tensor, bad: Tensor, counts: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Bradley-Terry: mean of -log sigmoid(good - bad), over the pairs that count (bool, of the same shape).

    With `smoothing`, that share of the pairs is taken to be the other way round, so that no margin pays without end.
    """
    margin = good - bad
    loss = -F.logsigmoid(margin)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * F.logsigmoid(-margin)
    return loss.mean() if counts is None else (loss * counts).sum() / counts.sum().clamp(min=1)


def anchor_loss(good: Tensor, bad: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of being the good one: a preference alone has no level."""
    logits = torch.cat([good, bad])
    targets = torch.cat([torch.full_like(good, 1 - smoothing), torch.full_like(bad, smoothing)])
    return F.binary_cross_entropy_with_logits(logits, targets)


def grainy(videos: Tensor, generator: Generator) -> Tensor:
    """Clips with a fine grain of the generator's own, so that no exact value of a pixel tells anything."""
    return videos + 0.02 * torch.randn(videos.shape, generator=generator).to(videos.device)
