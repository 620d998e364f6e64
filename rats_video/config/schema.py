"""What every configuration model shares, and the pieces that more than one command uses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rats_video.types import ClipSpec

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error rather than a silent typo."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ClipConfig(Config):
    """Clip size in pixels."""

    num_frames: PositiveInt = Field(17, description="frames a clip; 1 + a multiple of the VAE's temporal stride")
    height: PositiveInt = Field(64, description="pixels")
    width: PositiveInt = Field(64, description="pixels")
    fps: PositiveFloat = Field(8.0, description="frames a second when shown")

    @property
    def spec(self) -> ClipSpec:
        """The same as a plain value object."""
        return ClipSpec(self.num_frames, self.height, self.width, self.fps)


class OptimizerConfig(Config):
    """AdamW with linear warm-up and an optional cosine decay."""

    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit keeps its state in 8 bits")
    lr: PositiveFloat = Field(description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: bool = Field(default=False, description="cosine decay to zero at the last step; otherwise constant")
    max_grad_norm: PositiveFloat = 1.0
