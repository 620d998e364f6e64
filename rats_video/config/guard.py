"""Configuration of the guard against reward hacking."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rats_video.config.schema import Config, NonNegativeFloat, NumClips, PositiveInt


class GuardConfig(Config):
    """Looks at the student on fixed held-out prompts every few steps; nothing it sees enters a loss.

    The best student is the one with the highest held-out reward among those whose motion and saturation are still like
    the teacher's (without a held-out reward: with the highest reward).
    """

    every: PositiveInt = Field(50, description="steps; also before the first and after the last one")
    num_clips: NumClips = Field(32, description="held-out prompts looked at, one clip each, the same every time")
    choose: Literal["best", "last"] = Field("best", description="which student the run ends with")
    on_alarm: Literal["warn", "stop", "shape"] = Field(
        "warn", description="reward up and guard down: say so, stop the run, or also double the weight on shaping"
    )
    motion_loss: NonNegativeFloat = Field(0.3, le=1, description="share of the teacher's motion that may be lost")
    saturation_gain: NonNegativeFloat = Field(0.3, description="how far saturation may exceed the teacher's, relative")
