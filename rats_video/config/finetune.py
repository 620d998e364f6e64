"""Configuration of `rats-video train teacher --data`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rats_video.config.compute import DenoiserConfig, FullWeights, Weights
from rats_video.config.schema import (
    Config,
    NonNegativeInt,
    NumClips,
    OptimizerConfig,
    PositiveFloat,
    PositiveInt,
    Seed,
    SolverSteps,
)

Level = Annotated[float, Field(gt=0, le=1)]


class ValidationConfig(Config):
    """What is measured on held-out clips, always with the same noise."""

    every: PositiveInt = Field(200, description="steps; also before the first and after the last")
    num_clips: NumClips = Field(32, description="held-out clips at most whose loss is taken")
    sigmas: tuple[Level, ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="noise levels of that loss")
    num_videos: NonNegativeInt = Field(2, description="held-out captions that clips are sampled for")
    num_steps: SolverSteps = Field(50, description="solver steps of those clips")
    guidance_scale: PositiveFloat = Field(3.0, description="of those clips; 1 is off")


class FinetuneConfig(Config):
    """Root of `train teacher --data`: flow matching on prepared clips, from an existing model of any family."""

    seed: Seed = 0
    model: str = Field(description="pipeline folder or embedded name to start from")
    data: str | None = Field(None, description="folder of a `rats-video prepare`; the command's --data")
    weights: Weights = FullWeights()
    compute: DenoiserConfig = DenoiserConfig()
    embedded_guidance: PositiveFloat = Field(6.0, description="scale told to models that take it as an input")
    batch_size: NumClips = Field(16, description="clips a step, over all processes")
    micro_batch_size: NumClips | None = Field(
        None, description="clips a process works on at a time: the memory of these, the same gradient; null = all"
    )
    steps: PositiveInt = 1000
    checkpoint_every: PositiveInt = Field(100, description="steps")
    optimizer: OptimizerConfig
    noise: Literal["uniform", "logit_normal"] = Field(
        "uniform", description="how levels are drawn before the shift: evenly, or mostly in the middle (as SD3)"
    )
    shift: PositiveFloat = Field(3.0, description="of the noise levels, in training and of the sampled clips")
    prompt_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained on the empty prompt")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are the result; 0 is off")
    validation: ValidationConfig = ValidationConfig()

    @model_validator(mode="after")
    def _frozen_base_alone_is_offloaded(self) -> Self:
        if self.compute.offload != "none" and isinstance(self.weights, FullWeights):
            raise ValueError("compute.offload keeps a frozen base in host memory, but all weights train: use lora")
        return self
