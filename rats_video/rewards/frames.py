"""What all rewards that look at single frames have in common: which frames, how many at a time, and what it costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rats_video.config.reward import EndFrames, FrameChoice, FrameScorer, WindowFrames
from rats_video.errors import warn
from rats_video.types import RewardScores

Condition = Mapping[str, Tensor]
"""What a reward knows of its prompts: named tensors with one row a prompt."""


class FrameReward(nn.Module):
    """Scores some frames of each clip one by one; a clip's score is the mean of theirs.

    A frame that is not scored takes the score of the nearest one that is (the earlier of two), so a gate by latent
    frames works with few scored frames too; gradient goes to the scored ones alone. Frames are worked on `cfg.chunk` at
    a time and recomputed in backward, so memory does not grow with their number.

    A reward of this kind says how it reads prompts (`condition`, `token_counts`) and frames (`score_frames`).
    """

    text_limit: int | None = None
    """Tokens it reads of a prompt; None = all."""

    def __init__(self, cfg: FrameScorer) -> None:
        super().__init__()
        self.cfg = cfg
        self._warned = False

    def condition(self, prompts: Sequence[str]) -> Condition:  # noqa: ARG002  # to be overridden
        """What `score_frames` needs of B prompts, without gradient; rewards that ignore prompts return nothing."""
        return {}

    def score_frames(self, frames: Tensor, condition: Condition) -> Tensor:
        """Scores `[N]`, float32, of frames `[N, 3, height, width]` in [0, 1], each with its own row of condition."""
        raise NotImplementedError

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, before any is cut."""
        raise NotImplementedError

    def looks_at(self, num_frames: int) -> Tensor:
        """Indices of the frames that are scored; a window lies elsewhere for each prompt, so it may be any of them."""
        if isinstance(self.cfg.frames, WindowFrames):
            return torch.arange(num_frames)
        return scored_frames(num_frames, self.cfg.frames, [""])[0]

    def forward(self, videos: Tensor, prompts: Sequence[str]) -> RewardScores:
        """Score `[B, T, 3, height, width]` in [0, 1]; a prompt longer than the model reads is cut, with one warning."""
        batch, num_frames = videos.shape[:2]
        scored = scored_frames(num_frames, self.cfg.frames, prompts).to(videos.device)
        self.check_prompts(prompts)
        with torch.no_grad():
            rows = {name: row.repeat_interleave(scored.shape[1], 0) for name, row in self.condition(prompts).items()}
        frames = videos[torch.arange(batch, device=videos.device)[:, None], scored].flatten(0, 1)
        scores = in_chunks(self.score_frames, frames, rows, self.cfg.chunk).unflatten(0, (batch, -1))
        distance = (torch.arange(num_frames, device=videos.device)[:, None] - scored[:, None]).abs()  # [B, T, scored]
        return RewardScores(clip=scores.mean(dim=1), frames=scores.gather(1, distance.argmin(dim=2)))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Warn, once in the reward's life, of prompts whose end the model does not read."""
        if self._warned or self.text_limit is None:
            return
        long = sum(count > self.text_limit for count in self.token_counts(prompts))
        if long:
            self._warned = True
            warn(f"{long} of {len(prompts)} prompts are longer than the {self.text_limit} tokens this reward reads")


def in_chunks(score: Callable[[Tensor, Condition], Tensor], pixels: Tensor, condition: Condition, size: int) -> Tensor:
    """`score(pixels, condition)` of all rows, `size` at a time, each time recomputed in backward."""
    recompute = torch.is_grad_enabled() and pixels.requires_grad
    parts = []
    for first in range(0, len(pixels), size):
        chosen = slice(first, first + size)
        part, known = pixels[chosen], {name: row[chosen] for name, row in condition.items()}
        parts.append(checkpoint(score, part, known, use_reentrant=False) if recompute else score(part, known))
    return torch.cat(parts)


def scored_frames(num_frames: int, choice: FrameChoice, prompts: Sequence[str]) -> Tensor:
    """Indices `[B, scored]`, rising, of the frames that are scored for each of B prompts."""
    match choice:
        case WindowFrames():
            count = min(choice.count, num_frames)
            # The prompt alone decides: teacher and student, a part of the batch and a resumed run see the same frames.
            digests = (hashlib.sha256(prompt.encode()).digest() for prompt in prompts)
            first = torch.tensor([int.from_bytes(digest, "big") % (num_frames - count + 1) for digest in digests])
            return first[:, None] + torch.arange(count)
        case EndFrames():
            frames = evenly_spaced(num_frames, 3)
        case _:
            frames = evenly_spaced(num_frames, choice)
    return frames.expand(len(prompts), -1)


def evenly_spaced(num_frames: int, count: int | None) -> Tensor:
    """Indices of `count` frames, the first and the last among them; of all where a clip has no more, or for None."""
    if count is None or count >= num_frames:
        return torch.arange(num_frames)
    return torch.linspace(0, num_frames - 1, count).round().long()
