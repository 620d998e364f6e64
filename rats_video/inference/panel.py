"""One sampler's clip in a comparison: what it cost, and which track of the video has its sound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rats_video.sound import Sound

GIVEN = "given"
"""Title of the picture that clips start from."""
SEPARATOR = " · "
"""Between the figures of a panel's line."""


@dataclass(frozen=True)
class Panel:
    """One sampler's clip and what it cost; or, without a cost, the picture that all of them start from.

    Args:
        title: the sampler's name, e.g. "teacher".
        frames: pixels `[T, 3, H, W]` in [0, 1].
        num_steps: solver steps.
        nfe: network evaluations a clip.
        seconds: wall time a clip.
        reward: the clip's score, or None where none was computed.
        sound: of this clip, if it has one.
        track: of the video that has its sound, from 1.
    """

    title: str
    frames: Tensor
    num_steps: int = 0
    nfe: int = 0
    seconds: float = 0.0
    reward: float | None = None
    sound: Sound | None = None
    track: int | None = None

    @property
    def stats(self) -> str:
        """E.g. "50 steps · 100 NFE · 1.52 s · reward -0.16 · sound: track 2"."""
        if not self.nfe:
            return "first frame"
        parts = [
            f"{self.num_steps} step{'s' if self.num_steps != 1 else ''}",
            f"{self.nfe} NFE",
            f"{self.seconds:.2f} s" if self.seconds < 100 else f"{self.seconds:.0f} s",
        ]
        if self.reward is not None:
            parts.append(f"reward {self.reward:z.2f}")
        if self.track is not None:
            parts.append(f"sound: track {self.track}")
        return SEPARATOR.join(parts)


def with_tracks(panels: Sequence[Panel]) -> tuple[list[Panel], dict[str, Sound]]:
    """The panels, told their tracks, and the sounds of these by title: the last panel's first, which players play."""
    heard = [panel for panel in panels if panel.sound is not None]
    sounds = {panel.title: panel.sound for panel in heard[-1:] + heard[:-1] if panel.sound is not None}
    tracks = {title: track for track, title in enumerate(sounds, 1)}
    return [replace(panel, track=tracks.get(panel.title)) for panel in panels], sounds
