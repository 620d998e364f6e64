"""The base of rewards by large networks: prompts up to a limit, pixels in chunks that backward recomputes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rats_video.errors import warn

Condition = Mapping[str, Tensor]
"""A reward's encoding of its prompts: named tensors with one row a prompt."""


class PromptedReward(nn.Module):
    """A reward that reads prompts (`condition`, `token_counts`)."""

    text_limit: int | None = None
    """Tokens it reads of a prompt; None = all."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def condition(self, prompts: Sequence[str]) -> Condition:  # noqa: ARG002  # to be overridden
        """Encode B prompts, without gradient; rewards that ignore prompts return nothing."""
        return {}

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, before any is cut."""
        raise NotImplementedError  # called only on rewards with a `text_limit`, which define it

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Warn, once in the reward's life, of prompts whose end the model does not read."""
        if self._warned or self.text_limit is None:
            return
        long = sum(count > self.text_limit for count in self.token_counts(prompts))
        if long:
            self._warned = True
            warn(f"{long} of {len(prompts)} prompts are longer than the {self.text_limit} tokens this reward reads")


def score_in_chunks(
    score: Callable[[Tensor, Condition], Tensor], pixels: Tensor, condition: Condition, chunk: int
) -> Tensor:
    """Scores `[N]` of pixels `[N, ...]`, each with its own row of condition.

    `chunk` of them are scored at a time and recomputed in backward, so memory does not grow with their number.
    """
    recompute = torch.is_grad_enabled() and pixels.requires_grad
    scores = []
    for first in range(0, len(pixels), chunk):
        chosen = slice(first, first + chunk)
        some, rows = pixels[chosen], {name: row[chosen] for name, row in condition.items()}
        scores.append(checkpoint(score, some, rows, use_reentrant=False) if recompute else score(some, rows))
    return torch.cat(scores)
