"""The sound of clips, and rewards that hear it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """What B clips sound like: `waves` `[B, channels, samples]` in [-1, 1], `rate` samples a second."""

    waves: Tensor
    rate: int

    def take(self, rows: slice) -> Sound:
        """The sound of some clips."""
        return Sound(self.waves[rows], self.rate)

    def one(self, row: int) -> Sound:
        """The sound of one clip, in host memory."""
        return Sound(self.waves[row : row + 1].cpu(), self.rate)


def hears(scorer: object) -> bool:
    """True if a reward or a measure says that it takes the clips' sound as a third argument."""
    return bool(getattr(scorer, "hears", False))


def sees(reward: object) -> bool:
    """True if a reward looks at the pixels: all do but those that say otherwise."""
    return bool(getattr(reward, "sees", True))
