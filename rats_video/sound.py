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


def hears(reward: object) -> bool:
    """True if a reward says that it takes the clips' sound as a third argument; its scores say what they judge."""
    return bool(getattr(reward, "hears", False))


def sees(reward: object) -> bool:
    """True if a reward looks at the pixels: all do but those that say otherwise."""
    return bool(getattr(reward, "sees", True))
