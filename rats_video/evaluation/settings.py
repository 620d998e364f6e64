"""Settings of `evaluate`."""

from __future__ import annotations

from pydantic import Field

from rats_video.config.fields import Config, NumClips, PositiveFloat, SolverSteps
from rats_video.evaluation.features import FeaturesConfig
from rats_video.methods.teacher import GuidanceScale2


class DiversityConfig(Config):
    """More clips of the same prompts from other noise: does a prompt still give more than one clip?"""

    prompts: NumClips = Field(16, description="of the held-out prompts that are evaluated, the first ones")
    clips: int = Field(2, ge=2, le=1000, description="of each; the first is there anyway")


class EvaluationConfig(Config):
    """`evaluate`."""

    nfe: tuple[SolverSteps, ...] = (3, 4, 5, 8)
    num_clips: NumClips = 64
    batch_size: NumClips = 32
    teacher_steps: SolverSteps = 50
    guidance_scale: PositiveFloat = 3.0
    guidance_scale_2: GuidanceScale2 = None
    features: FeaturesConfig | None = Field(
        None, description="in what Frechet distances are taken; null leaves them out"
    )
    diversity: DiversityConfig | None = Field(DiversityConfig(), description="null leaves it out")
    latency_clips: int = Field(3, ge=0, le=1000, description="clips sampled alone to time each arm; 0 leaves it out")
