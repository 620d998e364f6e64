"""The base of all configuration models, and the types and parts that several of them use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from rats_video.errors import CONTROLS
from rats_video.types import ClipSpec

MOST_FRAMES = 10_000  # of a clip
MOST_PIXELS = 2**28  # of a clip, all frames together: 291 frames in 720p, 3 GB in float32


@dataclass(frozen=True)
class Below:
    """A bound on what a program would otherwise count, or make room, up to."""

    limit: int

    def __call__(self, number: int) -> int:
        """The number, if it and its negative are below the limit."""
        if abs(number) >= self.limit:
            raise ValueError(f"must be below {self.limit}")
        return number


def _within(limit: int) -> AfterValidator:
    return AfterValidator(Below(limit))


PositiveInt = Annotated[int, Field(ge=1), _within(2**31)]
NonNegativeInt = Annotated[int, Field(ge=0), _within(2**31)]
SolverSteps = Annotated[int, Field(ge=1), _within(10_000)]
NumClips = Annotated[int, Field(ge=1), _within(10**6)]
NumFrames = Annotated[int, Field(ge=1), _within(MOST_FRAMES)]
Seed = Annotated[int, _within(2**63), Field(description="seed of all randomness")]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Base of every configuration: frozen, plain text, and an unknown key is an error rather than a silent typo."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _is_plain_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple | dict) else (value,):
            if isinstance(text, str) and (found := CONTROLS.search(text)):
                raise ValueError(f"holds the control character {found[0]!a}")
        return value


class ClipConfig(Config):
    """Clip size in pixels."""

    num_frames: NumFrames = Field(17, description="frames a clip; 1 + a multiple of the VAE's temporal stride")
    height: PositiveInt = Field(64, description="pixels")
    width: PositiveInt = Field(64, description="pixels")
    fps: PositiveFloat = Field(8.0, description="frames a second when shown")

    @model_validator(mode="after")
    def _fits_somewhere(self) -> Self:
        if self.num_frames * self.height * self.width > MOST_PIXELS:
            raise ValueError(f"{self.num_frames} frames of {self.height} x {self.width} are over {MOST_PIXELS} pixels")
        return self

    @property
    def spec(self) -> ClipSpec:
        """The same as a plain value object."""
        return ClipSpec(self.num_frames, self.height, self.width, self.fps)
